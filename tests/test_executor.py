"""Every flat option with every codec, ranks as threads: sums against numpy, equal bits, nothing lost by error feedback."""

import functools

import numpy as np
import pytest
import torch
from ranks import DEADLINE_S, Ranks

from espresso_ds.compressors import registry
from espresso_ds.core.config import CompressorSettings
from espresso_ds.core.option import Device, Level, Option, Task
from espresso_ds.feedback import Feedback
from espresso_ds.planner.tree import option_tree
from espresso_ds.runtime.executor import Compressor, Executor, Unit
from espresso_ds.runtime.lanes import Lanes

OPTIONS = [option for option in option_tree((Device.CPU,), summable=True) if option.levels == {Level.FLAT}]
CODECS = [
    CompressorSettings(name="identity"),
    CompressorSettings(name="fp16"),
    CompressorSettings(name="bf16"),
    CompressorSettings(name="topk", density=0.1),
    CompressorSettings(name="randomk", density=0.1),
    CompressorSettings(name="efsignsgd"),
    CompressorSettings(name="quantize", bits=4),
]
SIZES = (1, 5, 130, 1001)


@pytest.fixture(scope="module", params=(1, 2, 3, 4))
def ranks(request):
    ranks = Ranks(request.param, lanes=2)
    yield ranks
    ranks.close()


def allowed(option: Option, settings: CompressorSettings) -> bool:
    return registry.make(settings).sum_dtype is not None or not option.sums_payloads


def gradients(world: int, numel: int, steps: int) -> torch.Tensor:
    """Shape (steps, world, numel), float32."""
    return torch.randn(steps, world, numel, generator=torch.Generator().manual_seed(numel * world))


def synchronise(rank, groups, option, settings, given, dtype=torch.float32):
    """All steps of one rank; its outputs (steps, numel) and its feedback."""
    steps, _, numel = given.shape
    feedback = Feedback(settings.feedback)
    executor = Executor([Compressor(registry.make(settings), feedback, seed=7)], groups, dtype)
    unit = Unit(3, "t", numel, option)
    lanes = Lanes(unit.steps, DEADLINE_S)
    outputs = []
    try:
        for step in range(steps):
            x = torch.zeros(executor.buffer_numel(unit), dtype=torch.float32 if option.compresses else dtype)
            x[:numel] = given[step, rank]
            lanes.wait([lanes.submit("t", executor.run(unit, x, step))])
            outputs.append(x[:numel].clone())
    finally:
        lanes.close()
    return torch.stack(outputs), feedback


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_lossless_options_give_the_sum_on_all_ranks(ranks, option):
    settings = CompressorSettings(name="identity")
    if not allowed(option, settings):
        pytest.skip("the identity's payloads are not summed")
    for numel in SIZES:
        given = gradients(ranks.world, numel, steps=2)
        results = ranks.run_lanes(functools.partial(synchronise, option=option, settings=settings, given=given))
        expected = given.to(torch.float64).sum(1)
        for outputs, _ in results:
            np.testing.assert_allclose(outputs.to(torch.float64), expected, rtol=0, atol=1e-5)
            assert torch.equal(outputs, results[0][0])


@pytest.mark.parametrize("settings", CODECS, ids=lambda s: s.name)
@pytest.mark.parametrize("option", [option for option in OPTIONS if option.compresses], ids=str)
def test_no_gradient_is_lost_and_all_ranks_end_with_equal_bits(ranks, option, settings):
    """Sum of inputs = sum of outputs + all residuals of all ranks, whatever the option and the codec."""
    if not allowed(option, settings):
        pytest.skip(f"payloads of {settings.name} cannot be summed")
    steps = 8
    # The rounding of a sum in 16 bits is the one error that no rank sees and no feedback corrects.
    rounded = option.sums_payloads and settings.name in ("fp16", "bf16")
    for numel in SIZES[1:]:
        given = gradients(ranks.world, numel, steps)
        results = ranks.run_lanes(functools.partial(synchronise, option=option, settings=settings, given=given))
        for outputs, _ in results:
            assert torch.equal(outputs, results[0][0])
        kept = sum(residuals(feedback, rank, ranks.world, numel, option) for rank, (_, feedback) in enumerate(results))
        balance = results[0][0].to(torch.float64).sum(0) + kept[:numel]
        np.testing.assert_allclose(balance, given.to(torch.float64).sum((0, 1)), rtol=0, atol=(0.05 if rounded else 2e-4) * steps)


def residuals(feedback, rank, world, numel, option) -> torch.Tensor:
    """This rank's residuals laid over the padded tensor, float64."""
    tasks = [action.task for action in option.actions]
    compressions = [number for number, task in enumerate(tasks) if task is Task.COMPRESS]
    padded = -(-numel // world) * world
    shard = padded // world
    total = torch.zeros(padded, dtype=torch.float64)
    for site, residual in feedback.state_dict().items():
        _, compression, row = site.split("/")
        begin = 0
        if residual.numel() == shard and world > 1:
            rows = tasks[compressions[int(compression)] + 1] is Task.ALLTOALL
            begin = (int(row) if rows else rank) * shard
        total[begin : begin + residual.numel()] += residual
    return total


@pytest.mark.parametrize("option", [option for option in OPTIONS if not option.sums_payloads], ids=str)
def test_bf16_on_the_wire_rounds_but_keeps_ranks_equal(ranks, option):
    given = gradients(ranks.world, 130, steps=1).bfloat16().float()
    settings = CompressorSettings(name="identity")
    results = ranks.run_lanes(functools.partial(synchronise, option=option, settings=settings, given=given, dtype=torch.bfloat16))
    expected = given.to(torch.float64).sum(1)
    for outputs, _ in results:
        np.testing.assert_allclose(outputs.to(torch.float64), expected, rtol=0.05, atol=0.05)
        assert torch.equal(outputs, results[0][0])


def test_randomk_draws_the_same_elements_on_all_ranks_and_others_in_the_next_step(ranks):
    given = torch.ones(2, ranks.world, 1000)
    settings = CompressorSettings(name="randomk", density=0.05, feedback="none")
    option = Option.parse("C.cpu AG.flat D.cpu")
    results = ranks.run_lanes(functools.partial(synchronise, option=option, settings=settings, given=given))
    first, second = (set(outputs.nonzero().flatten().tolist()) for outputs in results[0][0])
    assert len(first) == len(second) == 50
    assert first != second

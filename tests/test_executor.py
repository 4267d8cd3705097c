"""Every flat option with every codec at one to four ranks: sums, equal bits, nothing lost by error feedback."""

import numpy as np
import pytest
import torch
from driving import synchronised
from ranks import DEADLINE_S, Cluster

from espresso_ds.compressors import registry
from espresso_ds.core.config import CompressorSettings
from espresso_ds.core.option import Device, Level, Option
from espresso_ds.feedback import Feedback
from espresso_ds.planner.tree import option_tree
from espresso_ds.runtime.executor import Compressor, Executor, Unit, unfit
from espresso_ds.runtime.lanes import Lanes
from espresso_ds.runtime.paths import Encode, path

OPTIONS = [option for option in option_tree((Device.CPU,), summable=True) if option.levels == {Level.FLAT}]
DENSE = [name for name, entry in registry.CODECS.items() if "density" not in entry.parameters]
CODECS = [CompressorSettings(name=name) for name in DENSE]
CODECS += [CompressorSettings(name=name, density=0.1) for name in registry.CODECS if name not in DENSE]
CODECS += [CompressorSettings(name="quantize", bits=2, range="absmax"), CompressorSettings(name="signsgd", vote="mean")]
SIZES = (1, 5, 130, 1001)


@pytest.fixture(scope="module", params=(1, 2, 3, 4))
def ranks(request):
    ranks = Cluster(1, request.param, OPTIONS)
    yield ranks
    ranks.close()


def gradients(world: int, numel: int, steps: int) -> torch.Tensor:
    """Shape (steps, world, numel), float32."""
    return torch.randn(steps, world, numel, generator=torch.Generator().manual_seed(numel * world))


def units_for(codec, numel):
    """A unit of every option that the codec can do."""
    options = [option for option in OPTIONS if unfit(codec, option) is None]
    return [Unit(index, f"t{index}", numel, option) for index, option in enumerate(options)]


def run(ranks, settings, numel, given, mode, dtype=torch.float32):
    """Units, and each rank's outputs (steps, units, numel) and feedback."""
    codec = registry.make(settings.model_copy(update={"feedback": mode}))
    units = units_for(codec, numel)

    def work(groups):
        feedback = Feedback(mode)
        executor = Executor(units, [Compressor(codec, feedback, seed=7)], groups, dtype)
        return synchronised(executor, units, given[:, groups.place.rank], dtype), feedback

    return units, ranks.run(work)


@pytest.mark.parametrize("numel", SIZES)
def test_lossless_options_give_the_sum_on_all_ranks(ranks, numel):
    given = gradients(len(ranks.places), numel, steps=2)
    units, results = run(ranks, CompressorSettings(name="identity"), numel, given, "none")
    assert len(units) == len(OPTIONS) == 13
    expected = given.to(torch.float64).sum(1)[:, None].expand(-1, len(units), -1)
    for outputs, _ in results:
        np.testing.assert_allclose(outputs.to(torch.float64), expected, rtol=0, atol=1e-5)
        assert torch.equal(outputs, results[0][0])


@pytest.mark.parametrize("settings", CODECS, ids=lambda s: s.label)
def test_no_gradient_is_lost_and_all_ranks_end_with_equal_bits(ranks, settings):
    """Sum of inputs = sum of outputs + all residuals of all ranks, whatever the option and the codec, if that allows feedback."""
    steps, codec = 8, registry.make(settings)
    mode = "ef" if codec.contractive else "none"
    for numel in SIZES:
        given = gradients(len(ranks.places), numel, steps)
        units, results = run(ranks, settings, numel, given, mode)
        assert all(torch.equal(outputs, results[0][0]) for outputs, _ in results)
        assert results[0][0].isfinite().all()
        for index, unit in enumerate(units if mode == "ef" else ()):
            kept = sum(residuals(feedback, unit, place) for place, (_, feedback) in zip(ranks.places, results, strict=True))
            balance = results[0][0][:, index].to(torch.float64).sum(0) + kept
            # The rounding of a sum in 16 bits is the one error that no rank sees and no feedback corrects.
            rounded = unit.option.sums_payloads and settings.name in ("fp16", "bf16")
            atol = (0.05 if rounded else 2e-4) * steps
            np.testing.assert_allclose(balance, given.to(torch.float64).sum((0, 1)), rtol=0, atol=atol, err_msg=str(unit.option))


def residuals(feedback, unit, place) -> torch.Tensor:
    """This rank's residuals laid over the unit, float64."""
    sites = feedback.state_dict()["sites"]
    total = torch.zeros(unit.numel, dtype=torch.float64)
    for step in path(unit.option, unit.numel, unit.index, place).steps:
        for row, target in enumerate(step.targets if isinstance(step, Encode) else ()):
            if target.numel:
                total[target.start : target.stop] += sites[f"{unit.label}/{step.compression}/{row}"]["residual"]
    return total


def test_bf16_on_the_wire_rounds_but_keeps_ranks_equal(ranks):
    given = gradients(len(ranks.places), 130, steps=1).bfloat16().float()
    units, results = run(ranks, CompressorSettings(name="identity"), 130, given, "none", dtype=torch.bfloat16)
    expected = given.to(torch.float64).sum(1)[:, None].expand(-1, len(units), -1)
    for outputs, _ in results:
        np.testing.assert_allclose(outputs.to(torch.float64), expected, rtol=0.05, atol=0.05)
        assert torch.equal(outputs, results[0][0])


def test_units_in_lanes_give_what_units_alone_give(ranks):
    """Several sizes and both kinds of units at once, carried by the threads of lanes, step after step."""
    settings, steps = CompressorSettings(name="efsignsgd"), 3
    codec = registry.make(settings)
    units = [
        Unit(index, f"t{index}", numel, unit.option)
        for index, (unit, numel) in enumerate((unit, numel) for numel in SIZES for unit in units_for(codec, numel))
    ]
    given = gradients(len(ranks.places), max(SIZES), steps)

    def work(groups):
        executor = Executor(units, [Compressor(codec, Feedback("ef"), seed=7)], groups, torch.float32)
        lanes = Lanes(max(unit.steps for unit in units), DEADLINE_S)
        outputs = []
        try:
            for step in range(steps):
                xs = [torch.zeros(executor.buffer_numel(unit)) for unit in units]
                for unit, x in zip(units, xs, strict=True):
                    x[: unit.numel] = given[step, groups.place.rank, : unit.numel]
                jobs = [lanes.submit(u.label, executor.run(u, x, step)) for u, x in zip(units, xs, strict=True)]
                lanes.wait(jobs)
                outputs.append([x[: unit.numel] for unit, x in zip(units, xs, strict=True)])
        finally:
            lanes.close()
        return outputs

    results = ranks.run(work)
    for numel in SIZES:
        _, alone = run(ranks, settings, numel, given[:, :, :numel], "ef")
        places = [place for place, unit in enumerate(units) if unit.numel == numel]
        for rank, outputs in enumerate(results):
            for step in range(steps):
                assert torch.equal(torch.stack([outputs[step][place] for place in places]), alone[rank][0][step])


def test_randomk_draws_the_same_elements_on_all_ranks_and_others_in_the_next_step(ranks):
    codec = registry.make(CompressorSettings(name="randomk", density=0.05, feedback="none"))
    unit = Unit(0, "t", 1000, Option.parse("C.cpu AG.flat D.cpu"))

    def work(groups):
        return synchronised(
            Executor([unit], [Compressor(codec, Feedback("none"), 7)], groups, torch.float32), [unit], torch.ones(2, 1000)
        )

    first, second = (set(outputs.nonzero().flatten().tolist()) for outputs in ranks.run(work)[0][:, 0])
    assert len(first) == len(second) == 50
    assert first != second

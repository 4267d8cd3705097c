"""The error memory: nothing is lost, nothing poisons it, and it survives a checkpoint."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from espresso_ds.compressors.registry import CODECS, make
from espresso_ds.core.config import CompressorSettings
from espresso_ds.core.errors import MismatchError
from espresso_ds.feedback import Feedback

CASES = [CompressorSettings(name=name) for name in CODECS] + [
    CompressorSettings(name="quantize", bits=bits) for bits in (1, 2, 3)
]
NUMEL = 5003

codecs = pytest.mark.parametrize("codec", list(map(make, CASES)), ids=[f"{case.name}{case.bits or ''}" for case in CASES])


def gradient(step: int, numel: int = NUMEL) -> torch.Tensor:
    x = torch.randn(numel, generator=torch.Generator().manual_seed(step))
    x[: numel // 2 : 3] = 0
    return x


def step_of(memory, codec, x, seed=0, site="w"):
    payload = torch.empty(codec.payload_nbytes(len(x)), dtype=torch.uint8)
    memory.encode(codec, x, payload, seed, site)
    out = torch.zeros(len(x))
    codec.decode_add(payload, out, seed)
    return out


@codecs
def test_outputs_and_residual_sum_to_the_inputs(codec):
    memory = Feedback("ef")
    sent, given, largest = torch.zeros(NUMEL, dtype=torch.float64), torch.zeros(NUMEL, dtype=torch.float64), 0.0
    for step in range(50):
        x = gradient(step)
        kept = x.clone()
        sent += step_of(memory, codec, x, seed=step)
        given += x
        assert torch.equal(x, kept), "the gradient is only read"
        largest = max(largest, memory.state_dict()["w"].abs().max().item())
    residual = memory.state_dict()["w"].double()
    assert (sent + residual - given).abs().max() <= 50 * torch.finfo(torch.float32).eps * max(largest, 5.0)


@pytest.mark.parametrize("name", ["topk", "efsignsgd", "quantize", "fp16"])
def test_a_constant_gradient_arrives_in_the_mean(name):
    codec, memory, x = make(CompressorSettings(name=name)), Feedback("ef"), gradient(0)
    mean = sum(step_of(memory, codec, x, seed=step) for step in range(400)) / 400
    alone = step_of(Feedback("none"), codec, x)
    assert (mean - x).norm() < 0.5 * (alone - x).norm()


@codecs
@pytest.mark.parametrize("bad", (math.nan, math.inf))
def test_a_step_that_is_not_finite_shows_and_leaves_the_memory_alone(codec, bad):
    memory = Feedback("ef")
    step_of(memory, codec, gradient(0))
    before = memory.state_dict()["w"].clone()
    x = gradient(1)
    x[NUMEL // 2] = bad
    assert not step_of(memory, codec, x, seed=1).isfinite().all()
    assert torch.equal(memory.state_dict()["w"], before)
    assert step_of(memory, codec, gradient(2), seed=2).isfinite().all()


@codecs
def test_huge_finite_steps_are_remembered(codec):
    memory, x = Feedback("ef"), gradient(0).clamp(-1, 1) * 1e30
    out = step_of(memory, codec, x)
    assert torch.equal(memory.state_dict()["w"], x - out)


def test_a_sum_that_overflows_leaves_the_memory_alone():
    memory, codec = Feedback("ef"), make(CompressorSettings(name="topk", density=0.25))
    largest = torch.finfo(torch.float32).max
    memory.load_state_dict({"w": torch.tensor([1.0, largest, 0.0, 0.0])})
    step_of(memory, codec, torch.tensor([0.0, largest, 0.0, 0.0]))
    assert torch.equal(memory.state_dict()["w"], torch.tensor([1.0, largest, 0.0, 0.0]))


def test_sites_are_apart_also_in_threads():
    codec = make(CompressorSettings(name="topk"))

    def run(memory, site):
        for step in range(20):
            step_of(memory, codec, gradient(100 * site + step), site=str(site))

    one_by_one, at_once = Feedback("ef"), Feedback("ef")
    for site in range(4):
        run(one_by_one, site)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda site: run(at_once, site), range(4)))
    assert list(at_once.state_dict()) == ["0", "1", "2", "3"]
    for site, residual in one_by_one.state_dict().items():
        assert torch.equal(at_once.state_dict()[site], residual)
    assert at_once.nbytes == 4 * 4 * NUMEL


def test_without_feedback_nothing_is_kept():
    memory, codec = Feedback("none"), make(CompressorSettings(name="topk"))
    assert torch.equal(step_of(memory, codec, gradient(0)), step_of(memory, codec, gradient(0)))
    assert memory.nbytes == 0 and memory.state_dict() == {}
    with pytest.raises(MismatchError, match="set it to"):
        memory.load_state_dict({"w": torch.zeros(3)})


@codecs
def test_a_checkpoint_continues_to_the_bit(codec):
    straight, first, second = Feedback("ef"), Feedback("ef"), Feedback("ef")
    for step in range(3):
        step_of(straight, codec, gradient(step), seed=step)
        step_of(first, codec, gradient(step), seed=step)
    second.load_state_dict(first.state_dict())
    step_of(first, codec, gradient(7), seed=7)  # must not reach what was loaded
    assert torch.equal(step_of(straight, codec, gradient(3), seed=3), step_of(second, codec, gradient(3), seed=3))
    assert torch.equal(straight.state_dict()["w"], second.state_dict()["w"])


@pytest.mark.parametrize(
    "residual, message",
    [
        (torch.zeros(3, dtype=torch.float16), "torch.float16"),
        (torch.zeros(3, 1), r"\(3, 1\)"),
        (torch.tensor([math.nan]), "NaN or Inf"),
    ],
)
def test_unsound_residuals_are_refused(residual, message):
    memory = Feedback("ef")
    with pytest.raises(MismatchError, match=message):
        memory.load_state_dict({"w": residual})
    assert memory.state_dict() == {}


def test_another_size_is_named():
    memory, codec = Feedback("ef"), make(CompressorSettings(name="topk"))
    memory.load_state_dict({"w": torch.zeros(3)})
    with pytest.raises(MismatchError, match="site 'w' holds a residual of 3 elements, the tensor has 4"):
        step_of(memory, codec, torch.zeros(4))

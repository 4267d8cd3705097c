"""The memory around codecs: nothing is lost, a skipped step leaves no trace, and neither NaN nor a full memory stays behind."""

from __future__ import annotations

import itertools
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from feedback_steps import ANY, MODES, NUMEL, REAL, gradient, held, same, skip_unless_possible, step_of
from plain_codecs import FirstHalf, Largest

from espresso_ds.compressors.registry import make
from espresso_ds.core.config import CompressorSettings
from espresso_ds.core.errors import UnsupportedError
from espresso_ds.core.memory import feedback_bytes, receiver_bytes
from espresso_ds.feedback import Feedback

HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("codec", ANY)
def test_outputs_and_residual_sum_to_the_inputs(codec, dtype):
    """Each step rounds p = x + residual and p - decoded in fp32, and the residual in its own dtype: no more is lost."""
    memory = Feedback("ef", dtype)
    balance, allowed = torch.zeros(NUMEL, dtype=torch.float64), torch.zeros(NUMEL, dtype=torch.float64)
    for step in range(50):
        x = gradient(step)
        untouched, before = x.clone(), held(memory).get("w:residual", torch.zeros(NUMEL)).double()
        out = step_of(memory, codec, x, seed=step)
        assert torch.equal(x, untouched), "the gradient is only read"
        kept = held(memory)["w:residual"].double()
        balance += x.double() - out.double()
        allowed += (
            HALF_ULP[torch.float32] * ((x + before).abs() + (x + before - out).abs() * 1.01) + HALF_ULP[dtype] * kept.abs() * 1.01
        )
    assert ((balance - kept).abs() <= allowed).all()
    assert held(memory)["w:residual"].dtype == dtype


@pytest.mark.parametrize("mode", ("ef", "ef21"))
@pytest.mark.parametrize("codec", REAL)
def test_a_constant_gradient_arrives_in_the_mean(codec, mode):
    memory, x, steps = Feedback(mode), gradient(0, 200), 400  # the weakest send but a few elements of a block at each step
    mean = sum(step_of(memory, codec, x, seed=step) for step in range(steps)) / steps
    alone = sum(step_of(Feedback("none"), codec, x, seed=step) for step in range(steps)) / steps
    assert (mean - x).norm() <= 0.5 * (alone - x).norm() + 1e-5 * x.norm()  # of 400 additions


@pytest.mark.parametrize("mode", MODES)
def test_zero_gradients_send_what_is_remembered(mode):
    memory, codec, x = Feedback(mode), Largest(NUMEL // 10), gradient(0)
    received = [step_of(memory, codec, x if step == 0 or mode == "ef21" else torch.zeros(NUMEL)) for step in range(12)]
    assert received[1].count_nonzero() > 0
    result = received[-1] if mode == "ef21" else sum(received)
    if mode == "dgc":  # each element's momentum goes on until it is sent, at most in the 10th step
        assert (result.abs() >= x.abs() * (1 - 1e-6)).all() and (result.abs() <= x.abs() * 10).all()
    else:
        torch.testing.assert_close(result, x, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("mode", ("ef", "dgc"))
@pytest.mark.parametrize("codec", ANY)
def test_in_place_a_step_that_is_not_finite_shows_and_does_not_poison_the_memory(codec, mode, bad):
    skip_unless_possible(codec, mode)
    memory = Feedback(mode, clip=1.0)
    step_of(memory, codec, gradient(0))
    x = gradient(1)
    x[NUMEL // 2] = bad
    assert not step_of(memory, codec, x, seed=1).isfinite().all()
    assert all(tensor.isfinite().all() for tensor in held(memory).values())
    assert step_of(memory, codec, gradient(2), seed=2).isfinite().all()


def test_ef21_in_place_shows_a_step_that_was_not_finite_until_it_is_cleared():
    memory, codec, x = Feedback("ef21"), Largest(50), gradient(1)
    x[7] = math.nan
    step_of(memory, codec, gradient(0))
    assert step_of(memory, codec, x)[7].isnan() and step_of(memory, codec, gradient(2))[7].isnan()
    memory.clear()
    assert torch.equal(step_of(memory, codec, gradient(2)), step_of(Feedback("ef21"), codec, gradient(2)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("codec", ANY)
def test_a_skipped_step_leaves_no_trace(codec, mode):
    skip_unless_possible(codec, mode)
    straight, skipping = Feedback(mode), Feedback(mode, reversible=True)
    for step in range(3):
        before = held(skipping)
        for overflow in (1e38, math.inf, math.nan):
            x = gradient(100 + step)
            x[::97] *= overflow
            step_of(skipping, codec, x, seed=100 + step)
            skipping.rollback()
            assert step == 0 or same(held(skipping), before)
        assert torch.equal(
            step_of(skipping, codec, gradient(step), seed=step), step_of(straight, codec, gradient(step), seed=step)
        )
        skipping.commit()
        assert same(held(skipping), held(straight))


def test_a_site_used_twice_in_a_step_goes_on_from_its_first_use_and_back_before_it():
    straight, memory, codec = Feedback("ef"), Feedback("ef", reversible=True), Largest(50)
    step_of(straight, codec, gradient(0))
    step_of(memory, codec, gradient(0))
    memory.commit()
    before = held(memory)
    for step in (1, 2):
        assert torch.equal(step_of(memory, codec, gradient(step)), step_of(straight, codec, gradient(step)))
    memory.rollback()
    assert same(held(memory), before)
    for step in (1, 2):
        step_of(memory, codec, gradient(step))
    memory.commit()
    assert same(held(memory), held(straight))


def test_a_step_in_place_cannot_be_taken_back():
    with pytest.raises(UnsupportedError, match="reversible=True"):
        Feedback("ef").rollback()


@pytest.mark.parametrize("mode", MODES)
def test_memory_follows_the_loss_scale(mode):
    """Powers of two are exact: a run at another scale is the same run, multiplied."""
    plain, scaled, codec = Feedback(mode, clip=30.0), Feedback(mode, clip=30.0, reversible=True), Largest(50)
    for step, scale in enumerate((1024.0, 1024.0, 512.0, 512.0, 4096.0)):
        scaled.rescale(scale / scaled.scale)
        out = step_of(scaled, codec, gradient(step) * scale)
        assert torch.equal(out, step_of(plain, codec, gradient(step)) * scale)
        scaled.commit()
    assert same({key: tensor * 4096 for key, tensor in held(plain).items()}, held(scaled))


@pytest.mark.parametrize("kept", (False, True))
def test_a_step_under_way_is_rescaled_whether_it_will_be_kept_or_not(kept):
    memory, plain, codec = Feedback("ef", reversible=True), Feedback("ef"), Largest(50)
    for step in range(2):
        step_of(memory, codec, gradient(step))
        if step == 0 or kept:
            step_of(plain, codec, gradient(step))
        if step == 0:
            memory.commit()
    memory.rescale(0.5)
    memory.commit() if kept else memory.rollback()
    assert torch.equal(held(memory)["w:residual"], held(plain)["w:residual"] / 2)


def test_rescaling_never_overflows_and_takes_only_ratios():
    memory = Feedback("ef")
    step_of(memory, FirstHalf(), torch.tensor([0.0, 0.0, 3e38, -3e38]))
    memory.rescale(2.0)
    assert held(memory)["w:residual"].tolist() == [0, 0, torch.finfo(torch.float32).max, torch.finfo(torch.float32).min]
    for factor in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"rescale by {factor}"):
            memory.rescale(factor)


def test_sites_are_apart_also_in_threads():
    def run(memory, site):
        for step in range(20):
            step_of(memory, Largest(20 + site), gradient(100 * site + step, NUMEL + site), site=str(site))

    for mode in MODES:
        one_by_one, at_once = Feedback(mode), Feedback(mode)
        for site in range(4):
            run(one_by_one, site)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(run, [at_once] * 4, range(4)))
        assert same(held(at_once), held(one_by_one))
        assert list(at_once.state_dict()["sites"]) == sorted(one_by_one.state_dict()["sites"])


def test_threads_do_not_share_the_buffer_of_a_change():
    """Both have formed theirs before either is encoded."""
    formed = threading.Barrier(2, timeout=30)

    class Waiting(FirstHalf):
        def encode(self, *args, **more):
            formed.wait()
            super().encode(*args, **more)

    memory = Feedback("ef21")
    with ThreadPoolExecutor(2) as pool:
        outs = list(pool.map(lambda site: step_of(memory, Waiting(), gradient(site), site=str(site)), range(2)))
    for site, out in enumerate(outs):
        assert torch.equal(out[: NUMEL // 2], gradient(site)[: NUMEL // 2])


@pytest.mark.parametrize("reversible", (False, True))
@pytest.mark.parametrize("mode, dtype", [*itertools.product(("none", "ef", "dgc"), ("float32", "bfloat16")), ("ef21", "float32")])
def test_the_planner_knows_the_bytes(mode, dtype, reversible):
    memory, codec = Feedback(mode, getattr(torch, dtype), reversible=reversible), Largest(50)
    step_of(memory, codec, gradient(0))
    first = NUMEL * (feedback_bytes(mode, dtype, reversible) + receiver_bytes(mode, dtype, reversible))
    buffer = 4 * NUMEL if mode == "ef21" else 0
    assert memory.nbytes == first + buffer
    payload = torch.empty(codec.payload_nbytes(NUMEL), dtype=torch.uint8)
    memory.encode(codec, gradient(1), payload, 0, "second", recompressed=True)
    assert memory.nbytes == first + buffer + NUMEL * feedback_bytes(mode, dtype, reversible, recompressed=True)


@pytest.mark.parametrize("reversible", (False, True))
@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_allocated_after_the_first_step(mode, reversible):
    memory, codec, x = Feedback(mode, clip=1.0, reversible=reversible), FirstHalf(), gradient(0)
    payload, out = torch.empty(codec.payload_nbytes(NUMEL), dtype=torch.uint8), torch.zeros(NUMEL)

    def step():
        memory.encode(codec, x, payload, 0, "w")
        memory.decoded(out, "w/out")
        memory.commit()

    def largest_allocation(work) -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            work()
        return max((event.self_cpu_memory_usage for event in profile.events()), default=0)

    assert largest_allocation(step) >= 4 * NUMEL, "the first step allocates, and the profiler sees it"
    assert largest_allocation(step) <= 64  # the norm, a scalar
    assert largest_allocation(step) <= 64


def test_without_feedback_nothing_is_kept():
    memory, codec = Feedback("none"), Largest(50)
    assert torch.equal(step_of(memory, codec, gradient(0)), step_of(memory, codec, gradient(0)))
    assert memory.nbytes == 0 and memory.state_dict()["sites"] == {}


def test_what_a_mode_cannot_have_is_refused():
    with pytest.raises(UnsupportedError, match='"ef21" with "residual": "bfloat16"'):
        Feedback("ef21", torch.bfloat16)
    with pytest.raises(UnsupportedError, match="\"dgc\" with 'identity', which has no momentum"):
        step_of(Feedback("dgc"), make(CompressorSettings(name="identity")), gradient(0))


@pytest.mark.parametrize("mode", MODES)
def test_empty_tensors_are_fine(mode):
    memory = Feedback(mode, clip=1.0)
    assert step_of(memory, FirstHalf(), torch.empty(0)).numel() == 0
    assert memory.nbytes == 0

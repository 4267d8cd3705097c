"""Feedback in checkpoints: training goes on to the bit, and what does not fit is refused before anything changes."""

from __future__ import annotations

import io
import math

import pytest
import torch
from feedback_steps import ANY, MODES, NUMEL, gradient, held, same, skip_unless_possible, step_of
from plain_codecs import FirstHalf, Largest

from espresso_ds.core.errors import MismatchError, UnsupportedError
from espresso_ds.feedback import Feedback


@pytest.mark.parametrize("reversible", (False, True))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("codec", ANY)
def test_a_checkpoint_continues_to_the_bit(codec, mode, reversible):
    skip_unless_possible(codec, mode)
    straight, first, second = Feedback(mode), Feedback(mode, reversible=reversible), Feedback(mode, reversible=not reversible)
    for memory in (straight, first):
        memory.rescale(256.0)
        for step in range(3):
            step_of(memory, codec, gradient(step), seed=step)
            memory.commit()
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    second.load_state_dict(state)
    step_of(second, codec, gradient(7), seed=7)  # must not reach what was loaded
    second.load_state_dict(state)
    assert second.scale == 256.0
    assert torch.equal(step_of(straight, codec, gradient(3), seed=3), step_of(second, codec, gradient(3), seed=3))
    second.commit()
    assert same(held(straight), held(second))


@pytest.mark.parametrize("mode", MODES)
def test_loaded_memory_goes_where_its_tensor_is(mode):
    """As seen from the meta device, the one other that every machine has."""
    memory, codec = Feedback(mode, reversible=True), FirstHalf()
    step_of(memory, codec, gradient(0))
    memory.commit()
    memory.load_state_dict(memory.state_dict())
    payload = torch.empty(codec.payload_nbytes(NUMEL), dtype=torch.uint8, device="meta")
    memory.encode(codec, gradient(1).to("meta"), payload, 0, "w")
    memory.commit()
    assert all(tensor.is_meta for tensor in memory.state_dict()["sites"]["w"].values())


def test_an_unsettled_step_is_not_saved():
    memory = Feedback("ef", reversible=True)
    step_of(memory, Largest(50), gradient(0))
    with pytest.raises(UnsupportedError, match=r"1 sites \('w' ...\).*commit\(\) or rollback\(\)"):
        memory.state_dict()


def state(sites, mode="ef", dtype="float32", scale=1.0):
    return {"mode": mode, "dtype": dtype, "scale": scale, "sites": sites}


@pytest.mark.parametrize(
    "given, message",
    [
        (state({}, mode="ef21"), "saved with \"feedback\": 'ef21', this run has 'ef'; set it to 'ef21'"),
        (state({}, dtype="bfloat16"), "saved with \"residual\": 'bfloat16', this run has 'float32'"),
        ({"w": torch.zeros(3)}, "lacks mode, dtype, scale, sites"),
        (state({}, scale=math.nan), "scale is nan"),
        (state([]), "sites are list"),
        (state({"w": torch.zeros(3)}), "site 'w' holds nothing, not residual"),
        (state({"w": {"velocity": torch.zeros(3)}}), "site 'w' holds velocity, not residual"),
        (state({"w": {"residual": [0.0]}}), "residual of site 'w' is list"),
        (state({"w": {"residual": torch.zeros(3).half()}}), "torch.float16"),
        (state({"w": {"residual": torch.zeros(3, 1)}}), r"\(3, 1\)"),
        (state({"w": {"residual": torch.tensor([math.nan])}}), "NaN or Inf"),
    ],
)
def test_unsound_states_are_refused_and_change_nothing(given, message):
    memory = Feedback("ef")
    step_of(memory, Largest(50), gradient(0))
    before = held(memory)
    with pytest.raises(MismatchError, match=message):
        memory.load_state_dict(given)
    assert same(held(memory), before)


def test_tensors_of_a_site_have_one_size():
    with pytest.raises(MismatchError, match=r"site 'w' differ in size \(velocity 3, residual 4\)"):
        Feedback("dgc").load_state_dict(state({"w": {"velocity": torch.zeros(3), "residual": torch.zeros(4)}}, mode="dgc"))


@pytest.mark.parametrize("numel", (3, 4))
def test_what_a_site_holds_must_fit_what_is_compressed_there(numel):
    memory = Feedback("dgc")
    memory.load_state_dict(state({"w": {"residual": torch.zeros(3)}}, mode="dgc"))
    needed = f"site 'w' holds residual of 3 elements, what is compressed there needs velocity and residual of {numel}"
    with pytest.raises(MismatchError, match=needed):
        step_of(memory, Largest(2), torch.zeros(numel))


def test_another_size_is_named():
    memory = Feedback("ef")
    step_of(memory, Largest(2), torch.zeros(3))
    with pytest.raises(
        MismatchError, match="site 'w' holds residual of 3 elements, what is compressed there needs residual of 4"
    ):
        step_of(memory, Largest(2), torch.zeros(4))

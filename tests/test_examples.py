"""AQ-SGD and shared indices between two threads: what both sides remember of activations, and what arrives because of it."""

import threading
import time
from itertools import pairwise

import pytest
import torch
from codec_cases import normal
from ranks import DEADLINE_S, Ranks

from espresso_ds.compressors import registry
from espresso_ds.core.config import CompressorSettings
from espresso_ds.core.errors import MismatchError, SyncError
from espresso_ds.feedback import Feedback
from espresso_ds.feedback.examples import ExampleMemory
from espresso_ds.runtime.crossing import AHEAD, Incoming, Outgoing
from espresso_ds.runtime.parcel import Chosen, Way


@pytest.fixture
def pair():
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def exchanged(pair, ways, steps):
    """Rank 0 sends activations, rank 1 answers each with gradients; both get what arrives. A step is (x, gradient, numbers)."""

    def work(rank, group):
        forward, backward = ways()
        out, back = (Outgoing, Incoming) if rank == 0 else (Incoming, Outgoing)
        channels = out(forward, pair.groups[0][rank], DEADLINE_S), back(backward, pair.groups[1][rank], DEADLINE_S)
        got = []
        for x, gradient, numbers in steps:
            if rank == 0:
                channels[0].send(x, 0, True, numbers)
                got.append(torch.empty_like(gradient))
                channels[1].receive(got[-1], 0)
            else:
                got.append(torch.empty_like(x))
                there = channels[0].receive(got[-1], 0)
                assert there is None if numbers is None else torch.equal(there, numbers)
                channels[1].send(gradient, 0, True)
        for channel in channels if rank == 0 else channels[::-1]:
            channel.close()
        return got, forward

    return pair.run(work)


@pytest.fixture
def both_ways():
    ranks = Ranks(2, lanes=2)
    yield ranks
    ranks.close()


@pytest.mark.parametrize("per_example", [False, True], ids=["whole", "each example"])
@pytest.mark.parametrize("name", ["topk", "topk_sampled"])
@pytest.mark.parametrize("mode", ["none", "ef"])
def test_shared_indices_send_gradients_where_activations_went(both_ways, name, mode, per_example):
    """Where the activation that arrives is not zero the gradient arrives in bf16, elsewhere zero."""
    settings = CompressorSettings(name=name, density=0.2, feedback=mode)

    def ways():
        chosen = Chosen()
        forward = Way("forward", registry.make(settings), Feedback(mode), per_example, chosen=chosen)
        return forward, Way("backward", None, per_example=per_example, chosen=chosen)

    steps = [(normal(120, step).view(4, 30), normal(120, 99 + step).view(4, 30), None) for step in range(3)]
    (gradients, _), (activations, _) = exchanged(both_ways, ways, steps)
    for (_, sent, _), there, back in zip(steps, activations, gradients, strict=True):
        assert 12 <= (there != 0).sum() <= 24
        assert torch.equal(back, torch.where(there != 0, sent.bfloat16().float(), 0.0))


def test_shared_indices_do_not_hide_what_is_not_finite(both_ways):
    def ways():
        chosen = Chosen()
        return Way("f", registry.make(CompressorSettings(density=0.1)), chosen=chosen), Way("b", None, chosen=chosen)

    gradient = torch.zeros(40)
    gradient[7] = torch.inf
    (gradients, _), _ = exchanged(both_ways, ways, [(torch.arange(40.0), gradient, None)])
    assert not gradients[0].isfinite().all()


STORED = {"float32": 0.0, "bfloat16": 2.0**-8, "8 bits": 1 / 255}
"""How far what is held is off, as a share of the largest."""


@pytest.mark.parametrize("per_example", [False, True], ids=["whole", "each example"])
@pytest.mark.parametrize("storage", STORED)
@pytest.mark.parametrize(
    "codec", [{"name": "quantize", "bits": 4}, {"name": "fixed_point", "bits": 4}, {"density": 0.3}], ids=str
)
def test_aqsgd_sends_changes_of_examples_it_knows(both_ways, codec, storage, per_example):
    """Against the paper's algorithm in a dict: first visits whole, later ones m += C(x - m), in any company and order."""
    settings = CompressorSettings(**codec, feedback="aqsgd")

    def ways():
        memory = ExampleMemory("forward", storage)
        return Way("forward", registry.make(settings), per_example=per_example, examples=memory, seed=5), Way("backward", None)

    visits = [[3, 1, 4], [1, 5], [9, 2, 6], [3, 1, 2], [5, 4, 1, 3, 9]]
    steps = [(normal(20 * len(v), n).view(len(v), 20), torch.ones(1), torch.tensor(v)) for n, v in enumerate(visits)]
    (_, sender), (arrived, receiver) = exchanged(both_ways, ways, steps)
    for ours, theirs in zip(*(way.examples.state_dict()["tensors"].values() for way in (sender, receiver)), strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ("examples", "held"))
    held = {}
    for (x, _, numbers), there in zip(steps, arrived, strict=True):
        old = [place for place, number in enumerate(numbers.tolist()) if number in held]
        expected = x.clone()
        if old:
            known = torch.stack([held[number] for number in numbers[old].tolist()])
            expected[old] = known + coded(registry.make(settings), x[old] - known, per_example)
        if storage == "float32":
            torch.testing.assert_close(there, expected, rtol=1e-5, atol=1e-6)
        elif not old:
            assert torch.equal(there, x)
        # what is rounded is held by both sides alike, but not by this dict
        held.update(zip(numbers.tolist(), expected if storage == "float32" else rounded(there, storage), strict=True))
        if storage != "float32" and old:
            error = (there - x)[old].norm()
            assert error < (known - x[old]).norm()


def rounded(x, storage):
    memory = ExampleMemory("", storage)
    memory.keep(0, range(len(x)), x)
    found = memory.recall(0, range(len(x)))
    assert (found - x).abs().max() <= 2 * STORED[storage] * x.abs().max()
    return found


def coded(codec, change, per_example):
    """What a codec makes of changes, of shape (examples, elements)."""
    out = []
    for part in change.split(1) if per_example else [change]:
        shaped, numel = codec.for_shape(part.shape), part.numel()
        payload, flat = torch.empty(shaped.payload_nbytes(numel), dtype=torch.uint8), torch.zeros(numel)
        shaped.encode(part.reshape(-1).contiguous(), payload, 0)
        shaped.decode_add(payload, flat, 0)
        out.append(flat.view(part.shape))
    return torch.cat(out)


def test_aqsgd_comes_closer_with_every_visit_of_an_example(both_ways):
    """The same activations again and again: what arrives converges to them, as plain quantization never does."""
    settings = CompressorSettings(name="quantize", bits=2, feedback="aqsgd")

    def ways():
        return Way("f", registry.make(settings), examples=ExampleMemory("f")), Way("b", None)

    x = normal(400).view(4, 100)
    steps = [(0 * x, torch.ones(1), torch.arange(4)), *[(x, torch.ones(1), torch.arange(4))] * 6]
    _, (arrived, _) = exchanged(both_ways, ways, steps)
    errors = [(there - x).norm().item() for there in arrived[1:]]
    assert all(after < 0.6 * before for before, after in pairwise(errors))


@pytest.mark.parametrize(
    ("x", "numbers", "words"),
    [
        (torch.ones(3, 4), None, "no numbers of examples for a tensor of shape"),
        (torch.ones(3, 4), torch.arange(2), "2 numbers of examples"),
        (torch.ones(100, 8), torch.arange(100), 'raise "example_bytes"'),
    ],
)
def test_what_aqsgd_cannot_do_is_said_by_the_sender(pair, x, numbers, words):
    done = threading.Event()

    def work(rank, group):
        if rank == 1:
            done.wait(DEADLINE_S)
            return
        way = Way("f", registry.make(CompressorSettings(density=0.5)), examples=ExampleMemory("f", most_bytes=64 * 32))
        channel = Outgoing(way, group, DEADLINE_S)
        with pytest.raises(SyncError, match=words):
            for _ in range(AHEAD + 2):
                channel.send(x, 0, True, numbers)
                time.sleep(0.1)
        done.set()

    pair.run(work)


@pytest.mark.parametrize(("numel", "most", "there_is_room_for"), [(8, 1000, 31), (1000, 10_000, 2), (8, 31, 0), (8, 4000, 125)])
def test_examples_take_what_they_may_and_no_more(numel, most, there_is_room_for):
    memory = ExampleMemory("f", most_bytes=most)
    with pytest.raises(SyncError, match=f"holds {there_is_room_for} examples"):
        for number in range(1000):
            memory.keep(0, [number], torch.full((1, numel), float(number)))
            assert memory.nbytes <= most
    assert memory.nbytes <= most
    kept = list(range(there_is_room_for))
    if kept:
        assert torch.equal(memory.recall(0, kept)[:, 0], torch.arange(float(there_is_room_for)))


def test_examples_survive_a_checkpoint():
    first = ExampleMemory("f", "8 bits")
    first.keep(0, [7, 300], normal(80).view(2, 40))
    second = ExampleMemory("f", "8 bits")
    second.load_state_dict(first.state_dict())
    second.keep(0, [8], torch.ones(1, 40))
    assert second.known(0, [7, 8, 9, 300]) == [True, True, False, True]
    assert torch.equal(first.recall(0, [300, 7]), second.recall(0, [300, 7]))
    with pytest.raises(MismatchError, match='"example_memory": "8 bits", this run in "float32"'):
        ExampleMemory("f").load_state_dict(first.state_dict())
    with pytest.raises(MismatchError, match="examples of 40 elements, one of 41"):
        second.keep(0, [1], torch.ones(1, 41))

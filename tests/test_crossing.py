"""One direction of a pipeline boundary between two threads: what arrives is what codec and feedback make of it, in order."""

import os
import random
import threading
import time
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from codec_cases import normal
from ranks import DEADLINE_S, Ranks

from espresso_ds.compressors import registry
from espresso_ds.core.config import CompressorSettings
from espresso_ds.core.errors import EspressoError, MismatchError, SyncError
from espresso_ds.feedback import Feedback
from espresso_ds.feedback.examples import ExampleMemory
from espresso_ds.runtime.crossing import AHEAD, Incoming, Outgoing
from espresso_ds.runtime.parcel import Chosen, Way


def every_way():
    """Each codec of the registry with each feedback it may have here, by name."""
    found = {"as it is": None}
    for name, entry in registry.CODECS.items():
        strength = {"density": 0.1} if "density" in entry.parameters else {}
        for mode in ("none", "ef", "ef21"):
            settings = CompressorSettings(name=name, feedback=mode, **strength)
            try:
                registry.check(settings)
            except EspressoError:
                continue
            if name != "powersgd":
                found[f"{name}, {mode}"] = settings
    return found


EVERY = every_way()


def way_of(settings, per_example=False):
    if settings is None:
        return Way("test", None)
    return Way("test", registry.make(settings), Feedback(settings.feedback), per_example, seed=5)


@pytest.fixture
def pair():
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def crossed(pair, settings, tensors, training, per_example=False):
    """What rank 1 gets of the tensors that rank 0 sends; an item is (tensor, index)."""

    def work(rank, group):
        channel = (Outgoing, Incoming)[rank](way_of(settings, per_example), group, DEADLINE_S)
        got = []
        for (x, index), now in zip(tensors, training, strict=True):
            if rank == 0:
                channel.send(x, index, now)
            else:
                got.append(torch.empty_like(x))
                channel.receive(got[-1], index)
        channel.close()
        return got

    return pair.run(work)[1]


def simulated(settings, tensors, training, per_example):
    """The same by codec and feedback alone, one after the other."""
    way, sums = way_of(settings, per_example), {}
    for number, ((x, index), now) in enumerate(zip(tensors, training, strict=True)):
        count = len(x) if per_example and len(x) else 1
        rows = x.float().reshape(count, x.numel() // count)
        out = torch.empty_like(rows)
        for place, row in enumerate(rows):
            codec = way.codec.for_shape((1, *x.shape[1:]) if count > 1 else x.shape)
            payload = torch.empty(codec.payload_nbytes(row.numel()), dtype=torch.uint8)
            site, decoded = f"{index}/{place}", torch.zeros(row.numel())
            if not now:
                codec.encode(row.contiguous(), payload, 5 + number)
            else:
                way.feedback.encode(codec, row.contiguous(), payload, 5 + number, site)
            codec.decode_add(payload, decoded, 5 + number)
            if now and settings.feedback == "ef21":
                sums[site] = sums.get(site, torch.zeros_like(decoded)) + decoded
                decoded = sums[site]
            out[place] = decoded
        yield out.reshape(x.shape).to(x.dtype)


@pytest.mark.parametrize("per_example", [False, True], ids=["whole", "each example"])
@pytest.mark.parametrize("settings", EVERY.values(), ids=EVERY)
def test_what_arrives_is_what_codec_and_feedback_make_of_it(pair, settings, per_example):
    """Micro-batches of three tensors, one of them bf16 and one empty, training with an evaluation of other sizes in between."""
    tensors, training = [], []
    for step in range(4):
        shape = (3, 70) if step == 2 else (5, 40)
        tensors += [(normal(torch.Size(shape).numel(), step).view(shape), 0), (normal(36, 9 * step).view(4, 9).bfloat16(), 1)]
        tensors.append((torch.empty(0, 3), 2))
        training += [step != 2] * 3
    got = crossed(pair, settings, tensors, training, per_example)
    expected = [x for x, _ in tensors] if settings is None else simulated(settings, tensors, training, per_example)
    for place, (one, other) in enumerate(zip(got, expected, strict=True)):
        assert torch.equal(one, other), place


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


def test_sender_goes_on_until_enough_messages_wait(pair):
    """With nobody receiving a bounded number leaves, and `send` says so at the deadline; a receiver sets it free."""
    limit = threading.Event()

    def work(rank, group):
        if rank == 0:
            channel = Outgoing(Way("boundary 7 forward", None), group, 0.5)
            sent = 0
            with pytest.raises(SyncError, match=r"boundary 7 forward: .*no room"):
                while sent < 50:
                    channel.send(torch.full((100_000,), float(sent)), 0, True)
                    sent += 1
            limit.set()
            return sent
        limit.wait(DEADLINE_S)
        channel = Incoming(Way("boundary 7 forward", None), group, DEADLINE_S)
        out = torch.empty(100_000)
        for number in range(AHEAD):
            channel.receive(out, 0)
            assert out[0] == number
        return 0

    assert AHEAD <= pair.run(work)[0] <= AHEAD + 3


def test_faults_are_named(pair):
    """Nothing comes; a tensor of another size comes; the other side has ended."""

    def work(rank, group):
        way = Way("boundary 1 backward", None)
        if rank == 0:
            time.sleep(0.5)
            channel = Outgoing(way, group, DEADLINE_S)
            channel.send(torch.zeros(3), 0, True)
            channel.close()
            return
        channel = Incoming(way, group, 0.1)
        with pytest.raises(SyncError, match=r"boundary 1 backward: nothing came for 0\.1 s"):
            channel.receive(torch.empty(3), 0)
        channel._timeout_s = DEADLINE_S
        with pytest.raises(
            SyncError, match=r"expected message 0 with tensor 1 of shape \[4\], got message 0 with tensor 0 of shape \[3\]"
        ):
            channel.receive(torch.empty(4), 1)
        for _ in range(2):
            with pytest.raises(SyncError, match="the other stage has ended"):
                channel.receive(torch.empty(3), 0)

    pair.run(work)


SCHEDULES = int(os.environ.get("ESPRESSO_SCHEDULES", "20"))
"""How many random ones; 10,000 take about half an hour."""


def random_ways(rng):
    """Forward and backward of a boundary, for each side: a function that makes them, and whether examples have numbers."""
    per_example, pick = rng.random() < 0.3, rng.choice
    if rng.random() < 0.2:
        settings = CompressorSettings(name=pick(("topk", "topk_sampled")), density=pick((0.05, 0.3, 1.0)), feedback="none")

        def shared():
            chosen = Chosen()
            forward = Way("forward", registry.make(settings), per_example=per_example, chosen=chosen)
            return forward, Way("backward", None, per_example=per_example, chosen=chosen)

        return shared, False
    aqsgd = rng.random() < 0.3
    one, other = EVERY[pick(list(EVERY))], EVERY[pick(list(EVERY))]
    storage = pick(list(STORED))

    def ways():
        forward, backward = way_of(one, per_example), way_of(other, per_example)
        if aqsgd and one is not None and one.feedback != "none":  # those contract
            forward = replace(forward, feedback=Feedback("none"), examples=ExampleMemory("forward", storage))
        return forward, backward

    return ways, aqsgd


@pytest.mark.parametrize("seed", range(SCHEDULES))
def test_random_schedules_run_to_their_end(seed):
    """Stages in a row, each a thread, under DeepSpeed's own schedules, activations sent at once: no message is lost, none waits
    for ever."""
    from deepspeed.runtime.pipe import schedule

    rng = random.Random(seed)
    stages, micro_batches = rng.randint(2, 4), rng.randint(1, 9)
    made = [random_ways(rng) for _ in range(stages - 1)]
    shapes = [(rng.randint(1, 5), rng.randint(1, 800)) for _ in made]
    kinds = [rng.choice((schedule.TrainSchedule, schedule.InferenceSchedule)) for _ in range(3)]
    pairs = [Ranks(2, lanes=2) for _ in made]

    def stage(number):
        ends = {}
        for boundary in (number - 1, number):
            if 0 <= boundary < stages - 1:
                ways = made[boundary][0]()
                for lane, forward in ((0, True), (1, False)):
                    side = int(boundary == number - 1)
                    kind = Outgoing if (side == 0) == forward else Incoming
                    ends[boundary, forward] = kind(ways[lane], pairs[boundary].groups[lane][side], DEADLINE_S)
        done = dict.fromkeys(("ForwardPass", "RecvActivation", "SendGrad", "RecvGrad"), 0)
        for kind in kinds:
            training = kind is schedule.TrainSchedule
            for commands in kind(micro_batches=micro_batches, stages=stages, stage_id=number):
                for name in [type(command).__name__ for command in commands]:
                    boundary = number if name in ("ForwardPass", "RecvGrad") else number - 1
                    if name not in done or not 0 <= boundary < stages - 1:
                        continue
                    shape = shapes[boundary]
                    if name == "ForwardPass":
                        numbers = torch.arange(shape[0]) + done[name] % 3 if made[boundary][1] and training else None
                        ends[boundary, True].send(normal(shape[0] * shape[1], done[name]).view(shape), 0, training, numbers)
                    elif name == "SendGrad":
                        ends[boundary, False].send(normal(shape[0] * shape[1], done[name]).view(shape), 0, True)
                    else:
                        ends[boundary, name == "RecvActivation"].receive(torch.empty(shape), 0)
                    done[name] += 1
        for kind in (Outgoing, Incoming):
            for channel in ends.values():
                if isinstance(channel, kind):
                    channel.close()
        return done

    threads = []
    try:
        results = {}
        for number in range(stages):
            threads.append(threading.Thread(target=lambda n=number: results.update({n: stage(n)}), daemon=True))
            threads[-1].start()
        for thread in threads:
            thread.join(2 * DEADLINE_S)
        assert sorted(results) == list(range(stages))
    finally:
        for each in pairs:
            each.close()

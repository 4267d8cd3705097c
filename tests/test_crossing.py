"""One direction of a pipeline boundary between two threads: what arrives is what codec and feedback make of it, in order."""

import os
import random
import threading
import time
from dataclasses import replace

import pytest
import torch
from codec_cases import normal
from ranks import DEADLINE_S, Ranks
from test_examples import STORED

from espresso_ds.compressors import registry
from espresso_ds.core.config import CompressorSettings
from espresso_ds.core.errors import EspressoError, SyncError
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

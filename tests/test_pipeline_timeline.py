"""The pipeline's timeline: its order against DeepSpeed's own schedule, its times against a clock that ticks, and by hand."""

import random

import pytest

from espresso_ds.planner.pipeline_timeline import Boundary, Message, StageTimes, blocking, instructions, order, overlapped

SHAPES = [(stages, micro_batches) for stages in (2, 3, 4, 7) for micro_batches in (1, 2, 3, 8)]


@pytest.mark.slow
@pytest.mark.parametrize(("stages", "micro_batches"), SHAPES)
def test_order_is_deepspeeds(stages, micro_batches):
    from deepspeed.runtime.pipe import schedule

    kinds = {"ForwardPass": "F", "BackwardPass": "B", "SendActivation": "send F", "RecvActivation": "recv F"}
    kinds |= {"SendGrad": "send B", "RecvGrad": "recv B"}
    for stage in range(stages):
        commands = schedule.TrainSchedule(micro_batches=micro_batches, stages=stages, stage_id=stage)
        names = [type(command).__name__ for step in commands for command in step]
        found = instructions(stage, stages, micro_batches)
        assert [kinds[name] for name in names if name in kinds] == [kind for kind, _ in found]
        for kind in {kind for kind, _ in found}:
            assert [m for each, m in found if each == kind] == list(range(micro_batches))


def test_one_micro_batch_goes_there_and_back():
    stages = [StageTimes(1, 2, 0.5), StageTimes(3, 4, 0.25)]
    boundary = Boundary(Message(10, 0.1, 0.2), Message(20, 0.3, 0.4), 0.05, 0.01)
    there = 1 + 0.1 + (0.05 + 0.1) + 0.2
    back = there + 3 + 4 + 0.3 + (0.05 + 0.2) + 0.4
    assert overlapped(stages, [boundary], 1).step_s == pytest.approx(back + 2 + 0.5)
    assert blocking(stages, [boundary], 1).step_s == pytest.approx(back + 2 + 0.5)


def test_handling_delays_passes_by_half_and_messages_by_all_of_it():
    stages, link = [StageTimes(1, 2), StageTimes(3, 4), StageTimes(5, 6)], Boundary(Message(0), Message(0), 0, 0)
    plain, handled = (overlapped(stages, [link] * 2, 1, handling_s=each).step_s for each in (0.0, 0.2))
    passes, messages = 2 * (0.1 + 0.2 + 0.1), 4 * 0.2  # the middle stage has two neighbours
    assert handled == pytest.approx(plain + passes + messages)


@pytest.mark.parametrize(("stages", "micro_batches"), SHAPES)
def test_without_messages_it_is_the_pipelines_bubble(stages, micro_batches):
    """Equal stages: (micro-batches + stages - 1) times forward and backward, as in GPipe's and PipeDream's papers."""
    free = [Boundary(Message(0), Message(0), 0, 0)] * (stages - 1)
    expected = (micro_batches + stages - 1) * (2 + 3)
    assert overlapped([StageTimes(2, 3)] * stages, free, micro_batches).step_s == pytest.approx(expected)
    assert blocking([StageTimes(2, 3)] * stages, free, micro_batches).step_s >= expected - 1e-9


def ticking(stages, boundaries, micro_batches, contention):
    """The same by a clock: every worker looks, tick after tick, whether it can take up its next job. Times are whole ticks."""
    count = len(stages)
    delay = [0] * count
    for s in range(count):
        work = 0
        if s > 0:
            work += boundaries[s - 1].forward.decode_s + boundaries[s - 1].backward.encode_s
        if s < count - 1:
            work += boundaries[s].forward.encode_s + boundaries[s].backward.decode_s
        delay[s] = contention * work // 2
    at = {(s, kind, m): 0 for s, kind in ((0, "F"), (count - 1, "B")) for m in range(micro_batches)}
    jobs = {("pass", s): list(order(s, count, micro_batches)) for s in range(count)}
    queues, busy, ends, now = {}, {}, [0] * count, 0
    while True:
        for worker in [worker for worker, (until, _) in busy.items() if until == now]:
            _, (kind, m, sender, receiver) = busy.pop(worker)
            step = worker[0]
            if step == "pass":
                ends[sender] = now
                to = sender + 1 if kind == "F" else sender - 1
                if 0 <= to < count:
                    queues.setdefault(("encode", sender, kind), []).append((kind, m, sender, to))
            elif step == "encode":
                queues.setdefault(("card", sender), []).append((kind, m, sender, receiver))
            elif step == "card":
                queues.setdefault(("decode", receiver, kind), []).append((kind, m, sender, receiver))
            else:
                at[receiver, kind, m] = now
        started = False
        for (_, s), passes in jobs.items():
            if passes and ("pass", s) not in busy and at.get((s, *passes[0]), now + 1) <= now:
                kind, m = passes.pop(0)
                seconds = (stages[s].forward_s if kind == "F" else stages[s].backward_s) + delay[s]
                busy["pass", s] = now + seconds, (kind, m, s, s)
                started |= seconds == 0
        for worker, waiting in queues.items():
            if waiting and worker not in busy:
                kind, m, sender, receiver = job = waiting.pop(0)
                boundary = boundaries[min(sender, receiver)]
                message = boundary.forward if kind == "F" else boundary.backward
                transfer = boundary.alpha_s + boundary.beta_s_per_byte * message.nbytes
                seconds = {"encode": message.encode_s, "card": transfer, "decode": message.decode_s}[worker[0]]
                busy[worker] = now + seconds, job
                started |= seconds == 0
        if started:
            continue
        if not busy and not any(jobs.values()) and not any(queues.values()):
            return max(end + stage.after_s for end, stage in zip(ends, stages, strict=True))
        now += 1
        assert now < 10**5


@pytest.mark.parametrize("seed", range(60))
def test_against_a_ticking_clock(seed):
    """One direction of each boundary is twice as large as any tie could hide; times are odd, so that few events coincide."""
    rng = random.Random(seed)
    count, micro_batches, contention = rng.randint(2, 5), rng.randint(1, 6), rng.choice((0, 2))
    stages = [StageTimes(rng.randint(20, 60), rng.randint(20, 90), rng.randint(0, 9)) for _ in range(count)]
    boundaries = [
        Boundary(
            Message(rng.randint(1, 80), rng.randint(1, 9), rng.randint(1, 9)),
            Message(rng.randint(1, 80), rng.randint(1, 9), rng.randint(1, 9)),
            rng.randint(1, 3),
            rng.randint(0, 2),
        )
        for _ in range(count - 1)
    ]
    found = overlapped(stages, boundaries, micro_batches, contention=contention).step_s
    expected = ticking(stages, boundaries, micro_batches, contention)
    assert found == pytest.approx(expected, abs=max(8, 0.02 * expected))  # ties on a card go either way


@pytest.mark.parametrize("seed", range(30))
def test_overlap_never_loses(seed):
    rng = random.Random(seed)
    count, micro_batches = rng.randint(2, 6), rng.randint(1, 8)
    stages = [StageTimes(rng.uniform(1, 5), rng.uniform(1, 9)) for _ in range(count)]
    boundaries = [Boundary(Message(rng.uniform(1, 9)), Message(rng.uniform(1, 9)), 0.1, rng.uniform(0, 1)) for _ in stages[1:]]
    played = overlapped(stages, boundaries, micro_batches)
    assert played.step_s <= blocking(stages, boundaries, micro_batches).step_s + 1e-9
    assert all(
        end - start == pytest.approx(stage.backward_s) for (start, end), stage in zip(played.last_backward, stages, strict=True)
    )
    longer = overlapped(stages, boundaries, micro_batches, synchronised_s=[100.0] * count)
    assert longer.step_s >= 100


def test_halving_what_crosses_a_slow_link_nearly_halves_the_step():
    stages, links = [StageTimes(1, 1)] * 3, [Boundary(Message(100), Message(100), 0, 1)] * 2
    half = [link._replace(forward=Message(50), backward=Message(50)) for link in links]
    whole, less = (overlapped(stages, each, 6).step_s for each in (links, half))
    assert 1.8 < whole / less < 2

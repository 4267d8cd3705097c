"""Units that go by turns compressed and uncompressed, on ranks as threads: nothing is lost, ranks agree, memory is given back."""

import time

import pytest
import torch
from driving import drive
from ranks import DEADLINE_S, Cluster

from espresso_ds.compressors import registry
from espresso_ds.compressors.powersgd import PowerSGD
from espresso_ds.compressors.topk import TopK
from espresso_ds.core.config import CompressorSettings
from espresso_ds.core.errors import UnsupportedError
from espresso_ds.core.option import Option
from espresso_ds.feedback import Feedback
from espresso_ds.feedback.low_rank import LowRankMemory
from espresso_ds.runtime.agree import largest
from espresso_ds.runtime.executor import Compressor, Executor, Unit
from espresso_ds.runtime.guard import Guard, Way
from espresso_ds.runtime.lanes import Lanes
from espresso_ds.runtime.low_rank import LowRankCompressor
from espresso_ds.runtime.plain import PLAIN
from espresso_ds.runtime.synchroniser import Member, Scaling, Synchroniser
from espresso_ds.runtime.trace import Recorder

FLAT = "C.cpu AG.flat D.cpu"
NESTED = "C.cpu A2A.intra A2A.inter D.cpu C.cpu AG.inter AG.intra D.cpu"
OPTIONS = (
    "C.cpu A2A.flat D.cpu C.cpu AG.flat D.cpu",
    "C.cpu GA.flat D.cpu C.cpu BC.flat D.cpu",
    NESTED,
    "RD.intra C.cpu GA.inter D.cpu C.cpu BC.inter D.cpu BC.intra",
    "RS.intra AR.inter C.cpu AG.intra D.cpu",  # what is compressed is the same on every node
    "RS.intra C.cpu AG.inter D.cpu C.cpu AG.intra D.cpu",
)
LOW_RANK = "P.cpu AR.flat Q.cpu AR.flat D.cpu"
NUMEL = 203
TOPK = CompressorSettings(name="topk", density=0.1, feedback="ef")


@pytest.fixture(scope="module")
def cluster():
    made = Cluster(2, 2, [PLAIN, *map(Option.parse, (*OPTIONS, LOW_RANK))])
    yield made
    made.close()


def units_of(options):
    return [Unit(n, f"u{n}", NUMEL, Option.parse(text), shapes=((29, 7),)) for n, text in enumerate(options)]


def gradients(rank, step, units):
    generator = torch.Generator().manual_seed(100 * step + rank)
    return [torch.randn(NUMEL, generator=generator) for _ in units]


def one_step(executor, units, rank, step, scale=1.0):
    """The outputs of all units for this rank's gradients of the step, (units, n)."""
    xs = []
    for unit, grad in zip(units, gradients(rank, step, units), strict=True):
        x = torch.full((executor.buffer_numel(unit),), torch.nan)
        x[:NUMEL] = grad * scale
        xs.append(x)
    drive(executor, units, xs, step)
    return torch.stack([x[:NUMEL] for x in xs])


def inputs(world, steps, units):
    return sum(torch.stack(gradients(rank, step, units)).double() for rank in range(world) for step in steps)


def codec_of(options):
    if LOW_RANK in options:
        return LowRankCompressor(PowerSGD.of(CompressorSettings(name="powersgd", rank=1)), LowRankMemory("ef"), 3)
    return Compressor(registry.make(TOPK), Feedback("ef"), 0)


@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [OPTIONS, (LOW_RANK,)], ids=["topk", "powersgd"])
def test_whatever_was_kept_back_is_sent_once_when_the_plan_is_dropped(cluster, options, wire):
    """Steps by turns as planned and uncompressed, then for good: all outputs add up to all inputs."""
    units = units_of(options)

    def work(groups):
        rank, compressor = groups.place.rank, codec_of(options)
        bare = Executor(units, [compressor], groups, wire).buffer_nbytes
        executor = Executor(units, [compressor], groups, wire, guarded=True)
        assert executor.buffer_nbytes - bare == (0 if wire is torch.float32 else 2 * NUMEL * len(units))
        outputs, late = [], []
        for step in range(7):
            executor.send_plain(units if step in (3, 5) else [])
            if step in (3, 5):
                held = compressor.feedback.state_dict()["sites"]
                before = {site: {name: x.clone() for name, x in named.items()} for site, named in held.items()}
            outputs.append(one_step(executor, units, rank, step))
            if step in (3, 5):  # residuals stay as they are
                after = compressor.feedback.state_dict()["sites"]
                assert before.keys() == after.keys()
                assert all(torch.equal(x, after[site][name]) for site, named in before.items() for name, x in named.items())
            executor.committed()
            compressor.feedback.commit()
        planned = compressor.feedback.nbytes
        executor.settle_on(units)
        executor.committed()  # of the step after which it was decided
        assert compressor.feedback.nbytes == planned
        for step in (7, 8, 9):
            late.append(one_step(executor, units, rank, step))
            compressor.feedback.commit()
            executor.committed()
        assert all(map(executor.keeps_scale, units))
        assert compressor.feedback.nbytes == 0
        assert executor.buffer_nbytes == (0 if wire is torch.float32 else 2 * NUMEL * len(units))
        return outputs, late

    told = cluster.run(work)
    outputs, late = told[0]
    for other_outputs, other_late in told[1:]:
        assert all(torch.equal(a, b) for a, b in zip([*outputs, *late], [*other_outputs, *other_late], strict=True))
    exact = {"rtol": 0, "atol": 2e-5} if wire is torch.float32 else {"rtol": 0.02, "atol": 0.3}
    for step, output in ((3, outputs[3]), (5, outputs[5]), (8, late[1]), (9, late[2])):
        torch.testing.assert_close(output.double(), inputs(4, [step], units), **exact)
    kept_back = late[0].double() - inputs(4, [7], units)
    assert kept_back.abs().max() > 0.5
    total = sum(output.double() for output in (*outputs, late[0]))
    torch.testing.assert_close(total, inputs(4, range(8), units), **exact)


def test_a_skipped_step_sends_what_was_kept_back_again(cluster):
    """As under a loss scale: the step in which the plan is dropped overflows on one rank, and so does the next."""
    units = units_of(OPTIONS)

    def work(groups):
        rank, memory = groups.place.rank, Feedback("ef", reversible=True)
        executor = Executor(units, [Compressor(registry.make(TOPK), memory, 0)], groups, torch.float32, guarded=True)
        taken = []
        for step in range(3):
            taken.append(one_step(executor, units, rank, step))
            memory.commit()
            executor.committed()
        executor.settle_on(units)
        for step in (3, 4):
            broken = one_step(executor, units, rank, step, scale=torch.inf if rank == 1 else 1.0)
            assert not broken.isfinite().all()
            memory.rollback()
        for step in (5, 6):
            taken.append(one_step(executor, units, rank, step))
            memory.commit()
            executor.committed()
        assert memory.nbytes == 0
        return sum(output.double() for output in taken)

    for total in cluster.run(work):
        torch.testing.assert_close(total, inputs(4, (0, 1, 2, 5, 6), units), rtol=0, atol=2e-5)


def test_units_are_dropped_one_by_one(cluster):
    """Only the second one is: its memory goes, the others keep theirs and go on as planned."""
    units = units_of(OPTIONS[:3])

    def work(groups):
        rank, memory = groups.place.rank, Feedback("ef")
        executor = Executor(units, [Compressor(registry.make(TOPK), memory, 0)], groups, torch.float32, guarded=True)
        executor.send_plain(units[1:2])
        mixed = one_step(executor, units, rank, 0)
        executor.committed()
        executor.settle_on(units[1:2])
        for step in (1, 2):
            settled = one_step(executor, units, rank, step)
            executor.committed()
        return mixed, settled, memory.state_dict()["sites"].keys()

    for mixed, settled, sites in cluster.run(work):
        assert {site.split("/")[0] for site in sites} == {"u0", "u2"}
        for step, output in ((0, mixed), (2, settled)):
            difference = (output.double() - inputs(4, [step], units)).abs().amax(1)
            assert difference[1] < 2e-5 and min(difference[0], difference[2]) > 0.1


@pytest.mark.parametrize(
    "settings",
    [CompressorSettings(name="dgc", density=0.1, feedback="dgc"), CompressorSettings(name="signsgd", feedback="none")],
    ids=lambda settings: settings.name,
)
def test_what_would_mean_something_else_is_never_sent_uncompressed(cluster, settings):
    (unit,) = units_of([FLAT])
    compressor = Compressor(registry.make(settings), Feedback(settings.feedback), 0)
    assert not Executor([unit], [compressor], cluster.groups[0], torch.float32, guarded=True).may_send_plain(unit)
    if settings.feedback == "dgc":
        with pytest.raises(UnsupportedError, match=r"u0: .*momentum"):
            compressor.feedback.release(torch.zeros(3), "u0")


@pytest.mark.parametrize("reversible", [False, True])
def test_what_is_released_is_released_once(reversible):
    memory, codec = Feedback("ef", reversible=reversible), registry.make(TOPK)
    x, payload = torch.arange(1.0, 1.0 + NUMEL), torch.empty(codec.payload_nbytes(NUMEL), dtype=torch.uint8)
    memory.encode(codec, x, payload, 0, "w")
    memory.commit()
    left = memory.state_dict()["sites"]["w"]["residual"].clone()
    assert left.count_nonzero() > NUMEL / 2

    def released():
        out = torch.zeros(NUMEL)
        memory.release(out, "w")
        memory.release(out, "another site")
        return out

    assert torch.equal(released(), left)
    if reversible:
        memory.rollback()
        assert torch.equal(released(), left)
    memory.commit()
    assert not released().any()


class Slow(TopK):
    """TopK that takes its time to encode."""

    def encode(self, *args, **kwargs):
        time.sleep(0.04)
        super().encode(*args, **kwargs)


def guarded_run(groups, control, codecs, slow_plain=(), steps=24):
    """A rank that trains two units of one parameter each under a guard, the k-th with the k-th codec; what it found, and whether
    what it sent and still remembers adds up to its gradients.
    """
    params = [torch.nn.Parameter(torch.zeros(NUMEL)) for _ in codecs]
    units = [Unit(n, f"u{n}", NUMEL, Option.parse(FLAT), n) for n in range(len(codecs))]
    memory, recorder, lanes = Feedback("ef"), Recorder(2, len(units)), Lanes(1, DEADLINE_S)
    made = [Compressor(codec, memory, 0) for codec in codecs]
    executor = Executor(units, made, groups, torch.float32, "cpu", recorder, guarded=True)
    members = [([unit], [Member(unit.label, param)]) for unit, param in zip(units, params, strict=True)]
    synchroniser = Synchroniser(members, executor, lanes, Scaling(1.0, 1.0), torch.float32, recorder)
    plain, sum_up = executor._plain, executor._plain.run

    def slowed(index, x, done):
        if index in slow_plain:
            time.sleep(0.04)
        yield from sum_up(index, x, done)

    plain.run = slowed

    def holds(numbers):
        from espresso_ds.core.run_trace import RunUnit
        from espresso_ds.runtime.trace import holds_s

        about = [RunUnit(label="u", unit=n, tensors=("t",), numel=1, option=FLAT, codec=None) for n in range(len(units))]
        return holds_s(recorder, about, numbers)

    guard = Guard(synchroniser.may_be_plain, 16, 1.0, lambda values: largest(values, control, DEADLINE_S), holds)
    total = torch.zeros(len(units), NUMEL, dtype=torch.float64)
    try:
        for step in range(steps):
            if guard.outcome is None:
                guard.begin()
            for param, grad in zip(params, gradients(groups.place.rank, step, units), strict=True):
                param.grad = grad.clone()
            for unit in units:
                synchroniser.ready(unit.label)
            synchroniser.flush()
            total += torch.stack([param.grad for param in params])
            executor.committed()
            if guard.outcome is None:
                if outcome := guard.end():
                    synchroniser.settle_on(outcome.dropped)
                else:
                    synchroniser.send_plain(guard.uncompressed)
    finally:
        lanes.close()
    left = {site: named["residual"].double() for site, named in memory.state_dict()["sites"].items()}
    return guard.outcome, total, left


CASES = {
    "the codec is slow": ((Slow, Slow), (), Way.UNCOMPRESSED, {0, 1}),
    "the wire is slow": ((TopK, TopK), (0, 1), Way.PLANNED, set()),
    "a codec is slow, and the wire": ((Slow, TopK), (1,), Way.MIXED, {0}),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_slow_is_dropped_and_nothing_is_lost(case):
    """Two ranks with real lanes and clocks; 40 ms of sleep stand for what is slow, all else takes about a millisecond."""
    classes, slow_plain, way, dropped = CASES[case]
    ranks = Cluster(1, 2, [PLAIN, Option.parse(FLAT)])
    control = Cluster(1, 2, [PLAIN])
    try:
        controls = [next(iter(groups.by_lane.values())) for groups in control.groups]
        told = ranks.run(
            lambda groups: guarded_run(groups, controls[groups.place.rank], [cls(0.1) for cls in classes], slow_plain)
        )
    finally:
        ranks.close()
        control.close()
    outcomes, totals, lefts = zip(*told, strict=True)
    assert outcomes[0] == outcomes[1] and torch.equal(totals[0], totals[1])
    assert (outcomes[0].way, outcomes[0].dropped) == (way, dropped), outcomes[0].text()
    sent = totals[0].clone()
    for left in lefts:
        assert set(left) == {f"u{n}/0/0" for n in {0, 1} - dropped}
        for site, residual in left.items():
            sent[int(site[1])] += residual
    units = units_of([FLAT, FLAT])
    torch.testing.assert_close(sent, inputs(2, range(24), units), rtol=0, atol=1e-4)

"""PowerSGD beside codecs in one executor, and what plans and settings may not ask of it."""

import pytest
import torch
from planner_cases import cluster_of, codecs_of, costs_of, trace_of
from ranks import DEADLINE_S, Cluster

from espresso_ds.compressors import registry
from espresso_ds.compressors.powersgd import PowerSGD
from espresso_ds.core.config import CompressorSettings
from espresso_ds.core.errors import FileError, UnsupportedError
from espresso_ds.core.option import Option
from espresso_ds.feedback import Feedback
from espresso_ds.feedback.low_rank import LowRankMemory
from espresso_ds.runtime.executor import Compressor, Executor, Unit
from espresso_ds.runtime.lanes import Lanes
from espresso_ds.runtime.low_rank import LowRankCompressor
from espresso_ds.runtime.trace import Recorder

LOW_RANK, PLAIN = Option.parse("P.cpu AR.flat Q.cpu AR.flat D.cpu"), Option.parse("AR.flat")
SIGN = Option.parse("C.cpu A2A.flat D.cpu C.cpu AG.flat D.cpu")
SHAPES = ((40, 30), (40,))
NUMEL = 40 * 31


def units():
    """All kinds, and an uncompressed one that is said to use PowerSGD, as in plans where that is the first compressor."""
    return [
        Unit(0, "factors", NUMEL, LOW_RANK, 0, SHAPES),
        Unit(1, "signs", NUMEL, SIGN, 1, SHAPES),
        Unit(2, "plain", NUMEL, PLAIN, 0, SHAPES),
        Unit(3, "more factors", NUMEL, LOW_RANK, 0, SHAPES),
    ]


def compressors():
    return [
        LowRankCompressor(PowerSGD(3), LowRankMemory(), 7),
        Compressor(registry.make(CompressorSettings(name="efsignsgd")), Feedback("ef"), 7),
    ]


def test_factors_and_payloads_on_the_same_lanes():
    ranks = Cluster(1, 2, [unit.option for unit in units()])
    given = torch.randn(5, 2, 4, NUMEL, generator=torch.Generator().manual_seed(0))

    def work(groups):
        kept, recorder = compressors(), Recorder(3, 4)
        executor = Executor(units(), kept, groups, torch.float32, recorder=recorder)
        assert executor.buffer_numel(units()[0]) == NUMEL
        assert executor.buffer_nbytes >= 2 * 4 * (3 * 40 + 40 + 2 * 3 * 30)
        lanes, outputs = Lanes(2, DEADLINE_S), []
        try:
            for step, gradients in enumerate(given[:, groups.place.rank]):
                xs = [torch.zeros(executor.buffer_numel(unit)) for unit in units()]
                for x, gradient in zip(xs, gradients, strict=True):
                    x[:NUMEL] = gradient
                jobs = [lanes.submit(unit.label, executor.run(unit, x, step)) for unit, x in zip(units(), xs, strict=True)]
                lanes.wait(jobs)
                outputs.append(torch.stack([x[:NUMEL] for x in xs]))
        finally:
            lanes.close()
        records = torch.tensor([list(map(int, record)) for lane in range(3) for record in recorder.lane(lane).read()[0]])
        for unit in (0, 3):
            own = records[records[:, 1] == unit]
            assert sorted(zip(own[:, 0].tolist(), own[:, 2].tolist(), strict=True)) == [
                (s, a) for s in range(5) for a in range(5)
            ]
        return torch.stack(outputs), [memory.state_dict()["sites"] for memory in (kept[0].feedback, kept[1].feedback)]

    try:
        (outputs, sites), (others, other_sites) = ranks.run(work)
    finally:
        ranks.close()
    assert torch.equal(outputs, others)
    total = given.double().sum(1)
    torch.testing.assert_close(outputs[:, 2].double(), total[:, 2], rtol=0, atol=1e-5)
    for unit, label in ((0, "factors"), (3, "more factors")):
        balance = outputs[:, unit].double().sum(0) + sum(s[0][label]["residual"].double() for s in (sites, other_sites))
        torch.testing.assert_close(balance, total[:, unit].sum(0), rtol=0, atol=1e-4)
    first, second = (sites[0][label]["basis"] for label in ("factors", "more factors"))
    assert not torch.equal(first, second)
    assert set(sites[0]) == {"factors", "more factors"} and all(name.startswith("signs/") for name in sites[1])


@pytest.mark.parametrize("unit", [Unit(0, "t", NUMEL, LOW_RANK, 1, SHAPES), Unit(0, "t", NUMEL, SIGN, 0, SHAPES)])
def test_tasks_of_others_are_refused(unit):
    ranks = Cluster(1, 1, [LOW_RANK, SIGN])
    try:
        with pytest.raises(UnsupportedError, match="P and Q are the tasks of powersgd"):
            Executor([unit], compressors(), ranks.groups[0], torch.float32)
    finally:
        ranks.close()


def test_settings():
    assert PowerSGD.of(CompressorSettings(name="powersgd")) == PowerSGD(4)
    assert PowerSGD.of(CompressorSettings(name="powersgd", rank=9, residual="bfloat16", seed=3)) == PowerSGD(9)
    for foreign in ({"density": 0.1}, {"bits": 4}, {"clip": 1.0}, {"warmup_steps": 3}):
        with pytest.raises(FileError, match=f"takes rank, not {next(iter(foreign))}"):
            PowerSGD.of(CompressorSettings(name="powersgd", **foreign))
    with pytest.raises(FileError, match="no rank"):
        registry.make(CompressorSettings(name="topk", rank=3))


def test_the_planner_says_what_to_do_instead():
    with pytest.raises(FileError, match=r"powersgd cannot be planned with.*espresso seal"):
        registry.resolve(CompressorSettings(name="powersgd", rank=2))
    with pytest.raises(FileError, match=r"P\.cpu was not measured.*shapes"):
        costs_of(trace_of([(1000, 0.1)]), cluster_of(), codecs_of()).walk(LOW_RANK, 1000)

"""Every codec x every feedback it may have x dtype of its memory x group shape x size, over schemes of every kind.

Ranks end with the same bits; nothing is lost by feedback; a run from a saved state goes on as if it had not been interrupted.
Options in full, against their maths, are in test_hierarchical.py and test_executor.py; codecs alone in test_codecs.py.
"""

import pytest
import torch
from driving import synchronised
from ranks import Cluster

from espresso_ds.compressors import registry
from espresso_ds.core.config import CompressorSettings
from espresso_ds.core.errors import EspressoError
from espresso_ds.core.option import Level, Option
from espresso_ds.feedback import Feedback
from espresso_ds.runtime.executor import Compressor, Executor, Unit, unfit
from espresso_ds.runtime.paths import Encode, path

FLAT = [
    "C.cpu AG.flat D.cpu",
    "C.cpu A2A.flat D.cpu C.cpu AG.flat D.cpu",
    "C.cpu A2A.flat AG.flat D.cpu",
    "C.cpu GA.flat D.cpu C.cpu BC.flat D.cpu",
    "RS.flat C.cpu AG.flat D.cpu",
    "C.cpu AR.flat D.cpu",
]
NESTED = [
    "RS.intra C.cpu A2A.inter D.cpu C.cpu AG.inter D.cpu AG.intra",
    "C.cpu A2A.intra A2A.inter D.cpu C.cpu AG.inter AG.intra D.cpu",
    "C.cpu GA.intra D.cpu C.cpu AG.inter D.cpu C.cpu BC.intra D.cpu",
    "RD.intra C.cpu GA.inter BC.inter D.cpu BC.intra",
    "RS.intra C.cpu AR.inter D.cpu AG.intra",
]
SHAPES = {(1, 1): FLAT, (1, 2): FLAT, (1, 3): FLAT, (1, 4): FLAT, (2, 2): FLAT + NESTED}
SIZES = (1, 7, 130)
LARGE = 2**16 + 3
STEPS = 3


def settings_of_every_codec():
    """Each codec with each feedback and memory that the registry lets it have."""
    found = []
    for name, entry in registry.CODECS.items():
        strength = {"density": 0.1} if "density" in entry.parameters else {}
        for mode in ("none", "ef", "ef21", "dgc"):
            for residual in ("float32", "bfloat16") if mode != "none" else ("float32",):
                settings = CompressorSettings(name=name, feedback=mode, residual=residual, momentum=0.0, **strength)
                try:
                    registry.check(settings)
                except EspressoError:
                    continue
                found.append(settings)
    return found


EVERY = settings_of_every_codec()


def name_of(settings):
    return f"{settings.name}-{settings.feedback}-{settings.residual}"


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def cluster(request):
    cluster = Cluster(*request.param, list(map(Option.parse, SHAPES[request.param])))
    yield cluster
    cluster.close()


def units_for(cluster, codec, mode, sizes):
    shape = cluster.places[0].nodes, cluster.places[0].ranks_per_node
    options = [option for option in map(Option.parse, SHAPES[shape]) if unfit(codec, option, mode) is None]
    return {n: [Unit(place, f"{n}/{place}", n, option) for place, option in enumerate(options)] for n in sizes}


def gradients(cluster, numel, steps=STEPS):
    return torch.randn(steps, len(cluster.places), numel, generator=torch.Generator().manual_seed(numel))


def new_feedback(settings):
    return Feedback(settings.feedback, getattr(torch, settings.residual), momentum=settings.momentum)


def run(cluster, settings, units, given, feedbacks=None, first=0):
    """Each rank's outputs (steps, units, n) and feedback."""
    codec = registry.make(settings)

    def work(groups):
        rank = groups.place.rank
        feedback = new_feedback(settings) if feedbacks is None else feedbacks[rank]
        executor = Executor(units, [Compressor(codec, feedback, seed=7)], groups, torch.float32)
        steps = []
        for step in range(first, len(given)):
            steps.append(synchronised(Shifted(executor, step), units, given[step : step + 1, rank]))
        return torch.cat(steps), feedback

    return cluster.run(work)


class Shifted:
    """An executor whose steps are counted from `first`."""

    def __init__(self, executor, first):
        self.buffer_numel, self._run, self._first = executor.buffer_numel, executor.run, first

    def run(self, unit, x, step):
        return self._run(unit, x, self._first + step)


def remembered(cluster, unit, results, name):
    """What all ranks hold of the unit's memory `name`, laid over the unit; what several nodes hold alike counts once."""
    total, held = torch.zeros(unit.numel, dtype=torch.float64), set()
    for place, (_, feedback) in zip(cluster.places, results, strict=True):
        sites = feedback.state_dict()["sites"]
        for step in path(unit.option, unit.numel, unit.index, place).steps:
            if not isinstance(step, Encode):
                continue
            between = [action.at is Level.INTER for action in unit.option.actions]
            whole = any(between[: step.number]) and not any(between[step.number :])  # the nodes hold the same sum
            for row, target in enumerate(step.targets):
                key = step.compression, row, target, place.rank % place.ranks_per_node
                if target.numel and not (whole and key in held):
                    held.add(key)
                    total[target.start : target.stop] += sites[f"{unit.label}/{step.compression}/{row}"][name].double()
    return total


@pytest.mark.parametrize("settings", EVERY, ids=name_of)
def test_ranks_end_equal_and_nothing_is_lost(cluster, settings):
    codec = registry.make(settings)
    sizes = (*SIZES, LARGE) if len(cluster.places) in (2, 4) else SIZES
    for numel, units in units_for(cluster, codec, settings.feedback, sizes).items():
        given = gradients(cluster, numel)
        results = run(cluster, settings, units, given)
        outputs = results[0][0]
        assert outputs.isfinite().all()
        assert all(torch.equal(outputs, other) for other, _ in results)
        if settings.feedback not in ("ef", "dgc"):
            continue
        for index, unit in enumerate(units):
            balance = outputs[:, index].double().sum(0) + remembered(cluster, unit, results, "residual")
            # bf16 rounds what is kept at every step; sums of fp16 and bf16 payloads are rounded where nobody sees it.
            coarse = settings.residual == "bfloat16" or (unit.option.sums_payloads and settings.name in ("fp16", "bf16"))
            allowed = 0.2 if coarse else 2e-4
            assert (balance - given.double().sum((0, 1))).abs().max() <= allowed, unit.option


@pytest.mark.parametrize("settings", [one for one in EVERY if one.feedback != "none"], ids=name_of)
def test_a_saved_state_goes_on_as_if_nothing_had_happened(cluster, settings):
    codec = registry.make(settings)
    (units,) = units_for(cluster, codec, settings.feedback, [130]).values()
    given = gradients(cluster, 130, steps=4)
    through = run(cluster, settings, units, given)
    loaded = []
    for _, feedback in run(cluster, settings, units, given[:2]):
        loaded.append(new_feedback(settings))
        loaded[-1].load_state_dict(feedback.state_dict())
    resumed = run(cluster, settings, units, given, loaded, first=2)
    for (outputs, feedback), (after, other) in zip(through, resumed, strict=True):
        assert torch.equal(outputs[2:], after)
        kept, again = feedback.state_dict()["sites"], other.state_dict()["sites"]
        assert kept.keys() == again.keys()
        assert all(torch.equal(kept[site][name], again[site][name]) for site in kept for name in kept[site])


def test_every_codec_and_every_feedback_is_in_it():
    assert {settings.name for settings in EVERY} == set(registry.CODECS)
    assert {settings.feedback for settings in EVERY} == {"none", "ef", "ef21", "dgc"}


def test_estimates_are_never_summed_in_16_bits():
    summed = Option.parse("C.cpu AR.flat D.cpu")
    for name, allowed in (("fp16", False), ("bf16", False), ("randomk", True)):
        codec = registry.make(CompressorSettings(name=name))
        assert unfit(codec, summed, "ef") is None
        assert (unfit(codec, summed, "ef21") is None) == allowed

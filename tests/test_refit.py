"""Refitting: runs made from the timeline of a true world that is not what the profiles say, with noise."""

import random
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_cases import cluster_of, codecs_of, random_rows, several, trace_of

from espresso_ds.core.errors import FileError, MismatchError, UnsupportedError
from espresso_ds.core.option import Device, Option, Task
from espresso_ds.core.run_trace import Mark, RunSpan, RunStep, RunTrace, run_units
from espresso_ds.planner.build import make_plan
from espresso_ds.planner.cost import Resource
from espresso_ds.planner.refit import refit
from espresso_ds.planner.refit_costs import NONE, Line, Sample, fit, worst
from espresso_ds.planner.refit_profiles import Model, Profiles
from espresso_ds.planner.refit_runs import undisturbed
from espresso_ds.planner.refit_work import served
from espresso_ds.planner.replan import replan
from espresso_ds.planner.timeline import iteration_time, simulate


@dataclass(frozen=True)
class World:
    """What the truth is of, over what the profiles say."""

    speed: float = 1.0
    before: float = 1.0
    encode: float = 1.0
    decode: float = 1.0
    fixed_s: float = 0.0
    beta: float = 1.0
    alpha_s: float = 0.0
    contention: float = 0.5
    link_contention: float = 0.1

    def of(self, profiles):
        """The true profiles."""
        trace, cluster, codecs = profiles
        tensors = [t.model_copy(update={"ready_s": t.ready_s * self.speed}) for t in trace.tensors]
        changed = {"tensors": tuple(tensors), "backward_s": trace.backward_s * self.speed}
        changed |= {"forward_s": trace.forward_s * self.before, "after_s": trace.after_s * self.before}
        routines = [
            cost.model_copy(
                update={
                    "seconds": tuple(self.alpha_s + self.beta * s for s in cost.seconds),
                    "alpha_s": self.alpha_s + self.beta * cost.alpha_s,
                    "beta_s_per_byte": self.beta * cost.beta_s_per_byte,
                }
            )
            for cost in cluster.routines
        ]
        return Profiles(
            trace.model_copy(update=changed),
            cluster.model_copy(update={"routines": tuple(routines), "contention": self.link_contention}),
            codecs.model_copy(update={"codecs": tuple(map(self._codec, codecs.codecs))}),
        )

    def _codec(self, codec):
        times = [
            times.model_copy(
                update={
                    "encode_s": tuple(self.fixed_s + self.encode * s for s in times.encode_s),
                    "decode_s": tuple(self.fixed_s + self.decode * s for s in times.decode_s),
                    "contention": self.contention,
                }
            )
            for times in codec.devices
        ]
        return codec.model_copy(update={"devices": tuple(times)})


def profiles_of(seed=0, tensors=12, contention=0.5, link_contention=0.1, bytes_per_s=25e6):
    """Two hosts behind a slow link, a model whose tensors are of many sizes."""
    rng = random.Random(seed)
    rows = random_rows(rng, tensors)
    trace = trace_of(rows, forward_s=0.1, backward_s=rows[-1][1] + 0.01, after_s=0.02)
    cluster = cluster_of(alpha_s=5e-4, bytes_per_s=bytes_per_s, contention=link_contention, handling_s=5e-4)
    codecs = codecs_of(encode=4e-9, decode=2e-9, fixed_s=2e-5, share=0.02, contention=contention)
    return Profiles(trace, cluster, codecs)


def planned(profiles, **settings):
    return make_plan(*profiles, made_by="tests", **{"thrift": 0.0, **settings})


def true_step(plan, profiles):
    """Seconds of a step of the plan where these profiles are the truth."""
    model = Model.of(plan, profiles)
    return iteration_time(*model)


def spans_of(plan, profiles, marked=True):
    """One step of the plan where these profiles are the truth, as the recorder would have seen it."""
    timeline = simulate(*Model.of(plan, profiles))
    forward_s, after_s = profiles.trace.forward_s, profiles.trace.after_s
    spans = []
    for unit, ready in enumerate(timeline.ready_s):
        mine = sorted((s.start_s + after_s, s.end_s + after_s) for s in timeline.spans if s.unit == unit)
        spans += [RunSpan(unit, number, start, end) for number, (start, end) in enumerate(mine)]
        moments = {Mark.READY: ready + after_s, Mark.SUBMITTED: ready + after_s, Mark.DONE: mine[-1][1]}
        spans += [RunSpan(unit, mark, at, at) for mark, at in moments.items()]
    if marked:
        spans.append(RunSpan(-1, Mark.BACKWARD, forward_s + after_s, timeline.backward_end_s + after_s))
    spans.append(RunSpan(-1, Mark.FLUSH, timeline.backward_end_s + after_s, timeline.synced_s + after_s))
    return spans


def jittered(profiles, rng, noise):
    """The same truth on another moment: everything off by some noise, each class on its own and all together."""

    def off():
        return rng.lognormvariate(0, noise)

    together = World(speed=off(), before=off(), encode=off(), decode=off(), beta=off())
    shaken = together.of(profiles)
    cluster, codecs = profiles.cluster, profiles.compressors
    return shaken._replace(
        cluster=shaken.cluster.model_copy(update={"contention": cluster.contention}),
        compressors=shaken.compressors.model_copy(
            update={
                "codecs": tuple(
                    new.model_copy(
                        update={
                            "devices": tuple(
                                a.model_copy(update={"contention": b.contention})
                                for a, b in zip(new.devices, old.devices, strict=True)
                            )
                        }
                    )
                    for new, old in zip(shaken.compressors.codecs, codecs.codecs, strict=True)
                )
            }
        ),
    )


def trace_file(plan, steps, rank=0, first=5, device="cpu"):
    made_for = plan.made_for
    return RunTrace(
        made_by="tests",
        plan=plan.seal,
        rank=rank,
        world_size=made_for.world_size,
        nodes=made_for.nodes,
        device=device,
        units=run_units(plan),
        steps=[RunStep(step=number, spans=spans) for number, spans in enumerate(steps, first)],
    )


def run_in(plan, truth, seed=0, steps=8, noise=0.01, marked=True):
    """Traces of two ranks."""
    rng = random.Random(seed)
    recorded = [spans_of(plan, jittered(truth, rng, noise), marked) for _ in range(steps)]
    return {f"run-{rank}.json": trace_file(plan, recorded, rank) for rank in range(plan.made_for.world_size)}


worlds = st.builds(
    World,
    speed=st.floats(0.8, 1.3),
    before=st.floats(0.8, 1.3),
    encode=st.floats(0.5, 3.0),
    decode=st.floats(0.5, 3.0),
    fixed_s=st.floats(0.0, 3e-4),
    beta=st.floats(0.6, 1.8),
    alpha_s=st.floats(0.0, 2e-3),
    contention=st.floats(0.0, 1.2),
    link_contention=st.floats(0.0, 0.4),
)


@settings(max_examples=12, deadline=None)
@given(world=worlds, seed=st.integers(0, 10**6), marked=st.booleans())
def test_a_refit_explains_the_run_and_replanning_is_no_loss(world, seed, marked):
    profiles = profiles_of(seed)
    plan, truth = planned(profiles), world.of(profiles)
    found = refit(plan, profiles, run_in(plan, truth, seed, marked=marked), "plan.json")
    old_s = true_step(plan, truth)
    assert true_step(plan, found.profiles) == pytest.approx(old_s, rel=0.03)
    (step, *_) = found.record.rows
    assert (step.what, step.before_s) == ("step", pytest.approx(true_step(plan, profiles), abs=1e-5))
    assert step.after_s == pytest.approx(step.measured_s, rel=0.01)
    assert abs(found.record.unexplained) < 0.05
    new = replan(plan, found, made_by="tests", thrift=0.0)
    assert true_step(new.plan, truth) <= 1.02 * old_s


def test_ranks_that_are_late_in_turns_make_every_step_long():
    """As ranks that share cores are: the early one's backward ends early, all else when the late one lets it."""
    profiles = profiles_of(3)
    plan, truth = planned(profiles), World(speed=1.3).of(profiles)
    late, quick = spans_of(plan, truth), spans_of(plan, profiles)
    own = {Mark.READY, Mark.SUBMITTED, Mark.BACKWARD}
    early = [mine if mine.action in own else shared for mine, shared in zip(quick, late, strict=True)]
    begins = next(span.end_s for span in early if span.action == Mark.BACKWARD)
    early = [span._replace(start_s=begins) if span.action == Mark.FLUSH else span for span in early]
    steps = [[early if (step + rank) % 2 else late for step in range(8)] for rank in range(2)]
    found = refit(plan, profiles, {str(rank): trace_file(plan, steps[rank], rank) for rank in range(2)}, "plan.json")
    assert true_step(plan, found.profiles) == pytest.approx(true_step(plan, truth), rel=0.01)
    assert abs(found.record.unexplained) < 0.01


def codec_and_link_s(plan, profiles):
    """Seconds of encoding, decoding and routines of the whole plan, undisturbed."""
    found = dict.fromkeys(("C", "D", "link"), 0.0)
    model = Model.of(plan, profiles)
    for piece, seconds in zip(model.pieces(), model.seconds(), strict=True):
        for action, taken in zip(piece.option.actions, seconds, strict=True):
            found[str(action.task) if isinstance(action.at, Device) else "link"] += taken
    return found


@settings(max_examples=8, deadline=None)
@given(world=worlds, seed=st.integers(0, 10**6))
def test_what_codecs_and_links_take_is_recovered(world, seed):
    profiles = profiles_of(seed)
    plan, truth = planned(profiles), world.of(profiles)
    if not any(Option.parse(tensor.option).compresses for tensor in plan.tensors):
        return
    found = refit(plan, profiles, run_in(plan, truth, seed), "plan.json")
    fitted, true = codec_and_link_s(plan, found.profiles), codec_and_link_s(plan, truth)
    assert fitted["link"] == pytest.approx(true["link"], rel=0.08)
    codec = fitted["C"] + fitted["D"], true["C"] + true["D"]
    known = found.profiles.compressors.codecs[0].devices[0].contention
    assert codec[0] * (1 + known) == pytest.approx(codec[1] * (1 + world.contention), rel=0.3)  # told apart only in part


def test_contentions_are_told_apart_where_units_differ_in_what_disturbs_them():
    profiles = profiles_of(3, tensors=40, bytes_per_s=8e6)
    world = World(contention=1.1, link_contention=0.35, speed=1.1, before=1.1)
    plan, truth = planned(profiles, uncompressed=True), world.of(profiles)
    found = refit(plan, profiles, run_in(plan, truth), "plan.json")
    assert found.profiles.cluster.contention == pytest.approx(0.35, abs=0.1)
    assert found.profiles.trace.backward_s == pytest.approx(1.1 * profiles.trace.backward_s, rel=0.05)
    codec = found.profiles.compressors.codecs[0].devices[0]
    assert codec.contention == pytest.approx(0.5)  # no codec ran, so nothing is known
    assert codec.encode_s == profiles.compressors.codecs[0].devices[0].encode_s


def test_contention_measured_while_a_host_stood_still_stops_no_refit():
    """It stays nearly as it was measured, since a run that misses it so far tells little; the overhead makes up for the step."""
    world = World(contention=1.1, link_contention=0.35)
    truth = world.of(profiles_of(3, tensors=40, bytes_per_s=8e6))
    told = profiles_of(3, tensors=40, bytes_per_s=8e6, link_contention=43.0)
    plan = planned(told, uncompressed=True)
    found = refit(plan, told, run_in(plan, truth), "plan.json")
    assert 0 <= found.profiles.cluster.contention < 43.0
    (step, *_) = found.record.rows
    assert step.after_s == pytest.approx(step.measured_s)


def test_a_run_that_goes_as_predicted_changes_nothing():
    profiles = profiles_of(1)
    plan = planned(profiles)
    found = refit(plan, profiles, run_in(plan, profiles, noise=0.0), "plan.json")
    for correction in found.record.corrections:
        assert correction.scale == pytest.approx(1.0, abs=0.01)
        assert abs(correction.offset_s) < 1e-4
    new = replan(plan, found, made_by="tests", thrift=0.0)
    assert new.kept and new.plan.tensors == plan.tensors
    assert new.plan.predicted.planned_s == pytest.approx(plan.predicted.planned_s, rel=1e-3)
    new.plan.check("plan2.json")


def test_planning_again_and_again_comes_to_rest():
    """In a world with codecs ten times as slow: the second plan differs, and once it was measured nothing changes any more."""
    profiles = profiles_of(5, bytes_per_s=60e6)
    world = World(encode=10.0, decode=10.0, contention=0.5, link_contention=0.1)
    plan, truth = planned(profiles), world.of(profiles)
    seconds, kept = [true_step(plan, truth)], []
    for turn in range(4):
        found = refit(plan, profiles, run_in(plan, truth, seed=turn), f"plan{turn}.json")
        new = replan(plan, found, made_by="tests", thrift=0.0)
        plan, profiles = new.plan, found.profiles
        seconds.append(true_step(plan, truth))
        kept.append(new.kept)
    assert not kept[0] and kept[-1]
    assert seconds[-1] < 0.9 * seconds[0]
    assert all(after < 1.02 * before for before, after in pairwise(seconds))


def test_what_did_not_run_gains_nothing_from_what_was_slower():
    profiles = profiles_of(2)
    both = several(profiles.compressors, profiles.compressors)
    profiles = profiles._replace(compressors=both)
    plan = planned(profiles)
    used = {tensor.codec for tensor in plan.tensors if Option.parse(tensor.option).compresses}
    assert len(used) == 1
    (ran,), (idle,) = used, {0, 1} - used
    for factor in (3.0, 0.4):
        truth = World(encode=factor, decode=factor, contention=0.5, link_contention=0.1, beta=1.5).of(profiles)
        found = refit(plan, profiles, run_in(plan, truth), "plan.json")
        was = both.codecs[ran].devices[0].encode_s[-1]
        now = [found.profiles.compressors.codecs[number].devices[0].encode_s[-1] / was for number in (ran, idle)]
        assert now[0] == pytest.approx(factor, rel=0.15)
        assert now[1] == pytest.approx(max(1.0, now[0]), rel=0.05)
        slopes = {
            cost.routine: cost.beta_s_per_byte / old.beta_s_per_byte
            for cost, old in zip(found.profiles.cluster.routines, profiles.cluster.routines, strict=True)
        }
        measured = {word.split(".")[0] for t in plan.tensors for word in t.option.split() if word.endswith(".flat")}
        most = max(slopes[Task(name)] for name in measured)
        assert most == pytest.approx(1.5, rel=0.1)
        assert all(slope == pytest.approx(most) for name, slope in slopes.items() if str(name) not in measured)
        assert any("not used in the run" in correction.why for correction in found.record.corrections)


def test_the_fit_of_a_line():
    rng = random.Random(0)
    sizes = [10 ** rng.uniform(-4, -1) for _ in range(20)]

    def samples(line):
        return [Sample(2, s, tuple(line(s) * rng.lognormvariate(0, 0.01) for _ in range(9))) for s in sizes]

    found = fit(samples(lambda s: 2 * 5e-4 + 1.7 * s))
    assert (found.scale, found.offset_s) == (pytest.approx(1.7, rel=0.02), pytest.approx(5e-4, rel=0.1))
    assert found.sure > 0.98
    rows = samples(lambda s: 2 * 5e-4 + 1.7 * s)
    total = sum(found(row.predicted_s, row.calls) for row in rows)
    assert total == pytest.approx(sum(row.middle_s for row in rows), rel=0.02)
    no_offset = fit(samples(lambda s: 0.5 * s))
    assert no_offset.scale == pytest.approx(0.5, rel=0.02) and 0 <= no_offset.offset_s < 5e-6
    thin = fit([Sample(1, 1.0, (2.0,))])
    assert 1.3 < thin.scale < 2.0
    unsteady = fit([Sample(1, 1.0, (0.3, 2.0, 14.0))])
    assert 1.0 < unsteady.scale < thin.scale
    assert fit([]) == NONE and worst([NONE]) == NONE
    assert worst([Line(1e-3, 1.5, 2, 1.0), Line(2e-3, 0.7, 9, 1.0)]) == Line(2e-3, 1.5)


def test_overlapping_codec_work_counts_once_and_late_ends_of_routines_not_at_all():
    profiles = profiles_of(0)
    plan = planned(profiles)
    run = trace_file(plan, [])
    unit = run.units[0].model_copy(update={"option": "C.cpu AG.flat D.cpu"})
    run = run.model_copy(update={"units": (unit, unit)})
    spans = [
        RunSpan(0, 0, 0.0, 1.0),
        RunSpan(0, 1, 1.0, 2.0),
        RunSpan(0, 2, 2.0, 5.0),
        RunSpan(1, 0, 1.0, 3.0),  # beside the decoding of the first from 2 to 3
        RunSpan(1, 1, 3.0, 5.0001),  # whoever waits for it decodes the first until 5
        RunSpan(1, 2, 5.0001, 6.0),
        RunSpan(-1, Mark.FLUSH, 4.0, 6.0),
    ]
    found = served(run, RunStep(step=1, spans=spans), [[1.0, 0.5, 1.0]] * 2)
    taken = Counter()
    for piece in found:
        taken[piece.unit, piece.action] += piece.seconds
    assert taken == pytest.approx({(0, 0): 1.0, (0, 1): 1.0, (0, 2): 2.5, (1, 0): 1.5, (1, 1): 0.5, (1, 2): 0.9999})
    assert [(piece.unit, piece.action) for piece in found if piece.hidden] == [(1, 1)]
    on_cpu = sorted((piece.start_s, piece.end_s) for piece in found if piece.resource is Resource.CPU)
    assert all(after[0] >= before[1] - 1e-12 for before, after in pairwise(on_cpu))


def test_copies_count_with_what_they_serve():
    profiles = profiles_of(1)
    plan = planned(profiles)
    spans = spans_of(plan, profiles)
    first = next(number for number, unit in enumerate(run_units(plan)) if "C.cpu" in unit.option)
    ready = next(span.end_s for span in spans if span.unit == first and span.action == Mark.READY)
    copies = RunSpan(first, Mark.COPY_IN, ready - 0.004, ready)
    runs = {"run.json": trace_file(plan, [[*spans, copies]] * 4)}
    plain = refit(plan, profiles, {"run.json": trace_file(plan, [spans] * 4)}, "plan.json").profiles
    more = refit(plan, profiles, runs, "plan.json").profiles
    assert codec_and_link_s(plan, more)["C"] > codec_and_link_s(plan, plain)["C"] + 1e-4


def test_disturbed_steps_are_left_out_and_said():
    profiles = profiles_of(1)
    plan = planned(profiles)
    runs = run_in(plan, profiles, noise=0.001)
    slow = run_in(plan, World(speed=3.0, before=3.0).of(profiles), steps=1, noise=0.0)
    for name, run in runs.items():
        bad = slow[name].steps[0].model_copy(update={"step": 99})
        runs[name] = run.model_copy(update={"steps": (*run.steps, bad)})
    found = refit(plan, profiles, runs, "plan.json")
    assert 99 not in found.record.steps and len(found.record.steps) == 8
    assert any("1 of 9 steps were disturbed" in note and "99" in note for note in found.record.notes)
    kept, dropped = undisturbed({1: 1.0, 2: 1.1, 3: 0.9, 4: 1.0, 5: 2.0})
    assert (kept, dropped) == ([1, 2, 3, 4], [5])
    (alone,) = list(runs.values())[:1]
    assert any("1 of 2 ranks' traces" in note for note in refit(plan, profiles, {"a": alone}, "plan.json").record.notes)


def test_what_cannot_be_learned_from_is_refused():
    profiles = profiles_of(1)
    plan = planned(profiles)
    runs = run_in(plan, profiles)
    run = runs["run-0.json"]

    def refused(kind, says, files, plan=plan, profiles=profiles):
        with pytest.raises(kind, match=says):
            refit(plan, profiles, files, "plan.json")

    refused(FileError, "no run trace given", {})
    refused(MismatchError, "recorded under the plan with seal 0123", {"a": run.model_copy(update={"plan": "0123"})})
    refused(UnsupportedError, "recorded on cuda with the host's clock", {"a": run.model_copy(update={"device": "cuda"})})
    refused(MismatchError, "3 ranks on 2 nodes, plan.json is for 2 on 2", {"a": run.model_copy(update={"world_size": 3})})
    refused(MismatchError, "a and b are both of rank 0", {"a": run, "b": run})
    refused(FileError, "2 whole steps", {"a": run.model_copy(update={"steps": run.steps[:2]})})
    other = run_in(plan, World(speed=1.4, before=1.4).of(profiles))["run-1.json"]
    refused(MismatchError, "ranks of one run wait", {"a": run, "b": other})
    wild = [spans_of(plan, World(speed=s, before=s).of(profiles)) for s in (0.5, 2.0, 1.0, 4.0, 0.7, 1.5)]
    refused(FileError, "steps differ too much to learn from", {"a": trace_file(plan, wild)})
    later = runs["run-1.json"]
    later = later.model_copy(update={"steps": tuple(s.model_copy(update={"step": s.step + 50}) for s in later.steps)})
    refused(FileError, "0 whole steps that all traces hold", {"a": run, "b": later})
    changed = profiles._replace(trace=profiles.trace.model_copy(update={"after_s": 0.5}))
    refused(MismatchError, "made from trace profile", runs, profiles=changed)

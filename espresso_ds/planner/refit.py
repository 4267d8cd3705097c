"""Corrections of a plan's profiles from a run under it, so that they explain the run: what `espresso replan` plans with.

1. Traces of the run's ranks are checked, disturbed steps left out (`refit_runs`), and each step is brought into the form that the
   timeline has (`refit_work`).
2. Compute: the speed before and during backward, and what codecs and links cost it (`refit_compute`).
3. Codec work, freed of what backward cost it in turn, gives one line for encoding and one for decoding of each codec; routines
   give one for each link, and a factor for each routine (`refit_costs`). Copies of gradients to and from a unit's buffer are no
   action of the model: they count as part of the unit's first and last action.
4. What then remains of the step is an overhead of every step, whatever the plan.

A routine takes as long as on the rank that came last to it: others wait. Everything is written as profiles of the same form, so
that a plan made from them is explained, compared and refitted again as any other.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import NamedTuple

from ..core.plan import Plan
from ..core.run_trace import RunTrace
from .compare import compare
from .cost import Resource
from .refit_compute import Compute, fit_compute
from .refit_costs import Line, fit
from .refit_profiles import CodecKey, Model, Profiles, RoutineKey, corrected_cluster, corrected_compressors, corrected_trace
from .refit_reasons import of_codecs, of_compute, of_links, of_overhead
from .refit_record import Refit, explained
from .refit_runs import Evidence, evidence
from .refit_samples import Samples
from .refit_work import Served, served
from .step_prediction import step_prediction
from .timeline import iteration_time

MUCH = 0.05
"""Share of the step that may stay unexplained without a word."""


class Refitted(NamedTuple):
    """Corrected profiles. `doubts` explain the run as well, with contentions that it cannot rule out; `record` is for people."""

    profiles: Profiles
    doubts: tuple[Profiles, ...]
    record: Refit


def refit(plan: Plan, profiles: Profiles, runs: Mapping[str, RunTrace], plan_name: str) -> Refitted:
    """Profiles corrected so that they explain a run of `plan`, and what was corrected and why.

    Args:
        plan: the plan that ran.
        profiles: those it was made from.
        runs: traces of one or more ranks of one run, by the names of their files.
        plan_name: the plan's file, for messages.

    Raises:
        MismatchError: the profiles are not the plan's, a trace is of another plan, or the ranks' traces are of different runs.
        FileError: too few or too unsteady steps, or a cost was not measured.
        UnsupportedError: the clock of the traces does not see what codecs take.
    """
    profiles.check(plan, plan_name)
    found = evidence(plan, runs, plan_name)
    model = Model.of(plan, profiles)
    seconds = model.seconds()
    work = [[served(run, step, seconds) for step in run.steps] for run in found.runs]
    compute, others = fit_compute(found, [work[rank][number] for number, rank in enumerate(found.slowest)], *model)
    best = _Fit.of(plan, profiles, found, work, model, compute)
    again = plan.model_copy(update={"step": step_prediction(*Model.of(plan, best.profiles))})
    before, after = (compare(version, found.run, plan_name, "the run") for version in (plan, again))
    record = Refit(
        plan=plan.seal,
        ranks=tuple(run.rank for run in found.runs),
        steps=tuple(step.step for step in found.run.steps),
        corrections=(
            *of_compute(compute, model.costs, len(found.run.steps)),
            *of_codecs(best.codecs, profiles.compressors),
            *of_links(best.links, best.routines),
            of_overhead(best.unexplained_s, len(found.run.steps)),
        ),
        rows=explained(before, after),
        unexplained=best.unexplained_s / after.step.measured_s,
        notes=(*found.notes, *_doubtful(best.unexplained_s / after.step.measured_s)),
    )
    doubts = tuple(_Fit.of(plan, profiles, found, work, model, other).profiles for other in others)
    return Refitted(best.profiles, doubts, record)


class _Fit(NamedTuple):
    """What the costs come to if the model's own compute was disturbed in one way."""

    profiles: Profiles
    codecs: Mapping[CodecKey, Line]
    links: Mapping[Resource, Line]
    routines: Mapping[tuple[Resource, RoutineKey], Line]
    unexplained_s: float

    @classmethod
    def of(
        cls,
        plan: Plan,
        profiles: Profiles,
        found: Evidence,
        work: list[list[list[Served]]],
        model: Model,
        compute: Compute,
    ) -> _Fit:
        samples = Samples(found, work, model, compute)
        codecs = {key: fit(rows) for key, rows in samples.codecs.items()}
        links = {link: fit(rows) for link, rows in samples.links().items()}
        routines = samples.routines_beside(links)
        fitted = Profiles(
            corrected_trace(profiles.trace, compute),
            corrected_cluster(profiles.cluster, links, routines, compute),
            corrected_compressors(profiles.compressors, codecs, compute, model.costs.contention),
        )
        step_s = statistics.median(step.seconds for step in found.run.steps)
        unexplained_s = step_s - iteration_time(*Model.of(plan, fitted))
        after_s = max(0.0, fitted.trace.after_s + unexplained_s)
        closed = fitted._replace(trace=fitted.trace.model_copy(update={"after_s": after_s}))
        return cls(closed, codecs, links, routines, unexplained_s)


def _doubtful(unexplained: float) -> tuple[str, ...]:
    if abs(unexplained) <= MUCH:
        return ()
    return (
        f"{100 * unexplained:.0f}% of the step is not explained by what its parts took, so the new plan's promise is no "
        "better than that; run again with nothing else on the hosts, for more steps",
    )

"""What of a run can be trusted: its ranks' traces checked against the plan and each other, disturbed steps left out."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from ..core.errors import FileError, MismatchError, UnsupportedError
from ..core.plan import Plan
from ..core.run_trace import TRACE_ENV, Mark, RunStep, RunTrace
from .compare import check_run

FEWEST = 3
"""Steps that a median needs to leave a bad one out."""
APART = 0.1
"""Ranks wait for each other in every step, so their steps take as long in the mean; means further apart are of different runs."""
DISTURBED = 0.15
"""A step is left out if it is longer or shorter than the median by this share of it and by five times the usual deviation."""
UNSTEADY = 0.3
"""A run whose middle half of steps is spread over more than this share of the median is no measurement."""


@dataclass(frozen=True)
class Evidence:
    """The ranks' traces of one run, by rank, with the steps that count; equally many, of the same numbers, on each.

    `slowest`: of each step, the index of the rank whose backward ended last; ranks that share cores take turns. `notes` are for
    people.
    """

    runs: tuple[RunTrace, ...]
    slowest: tuple[int, ...]
    notes: tuple[str, ...]

    @cached_property
    def run(self) -> RunTrace:
        """Each step as its slowest rank saw it: all others waited for that one."""
        steps = tuple(self.runs[rank].steps[number] for number, rank in enumerate(self.slowest))
        return self.runs[self.slowest[0]].model_copy(update={"steps": steps})

    @property
    def steps(self) -> list[tuple[RunStep, ...]]:
        """Step by step, each as the ranks saw it."""
        return list(zip(*(run.steps for run in self.runs), strict=True))


def evidence(plan: Plan, runs: Mapping[str, RunTrace], plan_name: str) -> Evidence:
    """Check the traces of one run of `plan`, one or more ranks by the names of their files, and choose the steps that count.

    Raises:
        MismatchError: a trace of another plan, a rank that is there twice, or ranks of different runs.
        FileError: too few steps, or none like the other.
        UnsupportedError: the clock of the trace does not see what codecs and routines take.
    """
    if not runs:
        raise FileError(f"no run trace given; record a run with `{RunTrace.MADE_BY}`")
    named = sorted(runs.items(), key=lambda item: item[1].rank)
    for name, run in named:
        check_run(plan, run, plan_name, name)
        if run.device != "cpu":
            raise UnsupportedError(
                f"{name}: recorded on {run.device} with the host's clock, which sees when codecs and routines are launched but "
                "not what they take; only runs on the CPU can be fitted so far"
            )
        if (run.world_size, run.nodes) != (plan.made_for.world_size, plan.made_for.nodes):
            raise MismatchError(
                f"{name}: recorded with {run.world_size} ranks on {run.nodes} nodes, {plan_name} is for "
                f"{plan.made_for.world_size} on {plan.made_for.nodes}; record a run of this plan"
            )
    for (name, run), (other, following) in pairwise(named):
        if run.rank == following.rank:
            raise MismatchError(f"{name} and {other} are both of rank {run.rank}; give one trace for each rank of one run")
    common = sorted(set.intersection(*({step.step for step in run.steps} for _, run in named)))
    if len(common) < FEWEST:
        raise FileError(
            f"{', '.join(runs)}: {len(common)} whole steps that all traces hold, at least {FEWEST} are needed; train for "
            f"{FEWEST + 2} steps or more, and give traces of one run"
        )
    seconds = {number: max(_step(run, number).seconds for _, run in named) for number in common}
    kept, dropped = undisturbed(seconds)
    if len(kept) < FEWEST or _spread([seconds[number] for number in kept]) > UNSTEADY:
        listed = ", ".join(f"{value:.3g}" for value in seconds.values())
        raise FileError(
            f"{', '.join(runs)}: the steps differ too much to learn from ({listed} s); run again with nothing else on the hosts"
        )
    _check_together({name: _only(run, common) for name, run in named})
    found = tuple(_only(run, kept) for _, run in named)
    notes = []
    if dropped:
        notes.append(
            f"{len(dropped)} of {len(common)} steps were disturbed and are left out: "
            + ", ".join(f"{number} ({seconds[number]:.3g} s)" for number in dropped)
        )
    if len(found) < plan.made_for.world_size:
        notes.append(
            f"{len(found)} of {plan.made_for.world_size} ranks' traces: what these waited for the others counts as time of the "
            f"link; record all with {TRACE_ENV}=run-{{rank}}.json"
        )
    ends = ([step.whole(Mark.FLUSH).start_s for step in run.steps] for run in found)
    return Evidence(found, tuple(of_step.index(max(of_step)) for of_step in zip(*ends, strict=True)), tuple(notes))


def undisturbed(seconds: Mapping[int, float]) -> tuple[list[int], list[int]]:
    """The steps that count and those that stick out, by number, from the seconds of each."""
    middle = statistics.median(seconds.values())
    deviation = 1.4826 * statistics.median(abs(value - middle) for value in seconds.values())
    most = max(DISTURBED * middle, 5 * deviation)
    kept = [number for number, value in seconds.items() if abs(value - middle) <= most]
    return kept, [number for number in seconds if number not in kept]


def _check_together(runs: Mapping[str, RunTrace]) -> None:
    """Raise MismatchError unless all could be of one run."""
    means = {name: statistics.fmean(step.seconds for step in run.steps) for name, run in runs.items()}
    least, most = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
    if means[most] > (1 + APART) * means[least]:
        raise MismatchError(
            f"a step took {means[most]:.3g} s in {most} and {means[least]:.3g} s in {least}, but ranks of one run wait for "
            "each other; give the traces of one run"
        )


def _spread(seconds: list[float]) -> float:
    quarter, middle, three = statistics.quantiles(seconds, n=4, method="inclusive")
    return (three - quarter) / middle


def _only(run: RunTrace, numbers: list[int]) -> RunTrace:
    return run.model_copy(update={"steps": tuple(step for step in run.steps if step.step in set(numbers))})


def _step(run: RunTrace, number: int) -> RunStep:
    return next(step for step in run.steps if step.step == number)

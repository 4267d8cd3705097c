"""Prediction and measurement side by side: a plan and the trace of a run under it, unit by unit.

Times count from the synchronisation of the step before. Measured ones are medians over the recorded steps, of one rank.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..core.errors import FileError, MismatchError
from ..core.option import Device, Option
from ..core.plan import Plan, StepPrediction, TensorDecision, UnitPrediction
from ..core.record import Record
from ..core.run_trace import Mark, RunStep, RunTrace, run_units
from .measured import COPIES, at_work, moments


class Pair(Record):
    """Seconds, predicted and measured."""

    predicted_s: float
    measured_s: float

    @property
    def ratio(self) -> float | None:
        """Measured over predicted; None where nothing was predicted."""
        return self.measured_s / self.predicted_s if self.predicted_s > 0 else None

    @property
    def difference_s(self) -> float:
        """Measured less predicted."""
        return self.measured_s - self.predicted_s


class ActionPair(Pair):
    """One action of a unit at work, all its chunks together."""

    action: str
    codec: bool


class UnitComparison(Record):
    """One unit of the plan. `copies_s`: measured only, for the gradients' way into the unit's buffer and back."""

    unit: int
    tensors: tuple[str, ...]
    option: str
    ready: Pair
    done: Pair
    actions: tuple[ActionPair, ...]
    copies_s: float

    @property
    def codec(self) -> Pair:
        """Its compressions and decompressions."""
        return total(action for action in self.actions if action.codec)

    @property
    def routines(self) -> tuple[ActionPair, ...]:
        """Its communication steps."""
        return tuple(action for action in self.actions if not action.codec)

    @property
    def work(self) -> Pair:
        """All that the unit itself took: not the time in which it waited for others."""
        work = total(self.actions)
        return Pair(predicted_s=work.predicted_s, measured_s=work.measured_s + self.copies_s)


class Comparison(Record):
    """A plan and a run under it. `units`: those whose own work differs most from the prediction come first."""

    plan: str
    rank: int
    world_size: int
    device: str
    steps: int
    step: Pair
    backward_end: Pair
    exposed: Pair
    codec: Pair
    links: Pair
    copies_s: float
    units: tuple[UnitComparison, ...]


def total(pairs: Iterable[Pair]) -> Pair:
    """The sums of both sides."""
    known = list(pairs)
    return Pair(predicted_s=sum(p.predicted_s for p in known), measured_s=sum(p.measured_s for p in known))


def compare(plan: Plan, run: RunTrace, plan_name: str, run_name: str) -> Comparison:
    """Lay a run beside the plan that it ran under; the names of both files are for messages.

    Raises:
        MismatchError: the run had another plan.
        FileError: the plan holds no prediction for its units, or the run no whole step or not all units.
    """
    predicted = _prediction(plan, plan_name)
    check_run(plan, run, plan_name, run_name)
    groups = plan.units()
    taken = [_ways(run, step, len(groups), run_name) for step in run.steps]
    units = [
        _unit(number, group, prediction, predicted.after_s, [ways[number] for ways in taken])
        for number, (group, prediction) in enumerate(zip(groups, predicted.units, strict=True))
    ]
    waits = [step.whole(Mark.FLUSH) for step in run.steps]
    return Comparison(
        plan=plan.seal,
        rank=run.rank,
        world_size=run.world_size,
        device=run.device,
        steps=len(run.steps),
        step=_pair(predicted.synced_s + predicted.after_s, [step.seconds for step in run.steps]),
        backward_end=_pair(predicted.backward_end_s + predicted.after_s, [wait.start_s for wait in waits]),
        exposed=_pair(predicted.synced_s - predicted.backward_end_s, [wait.end_s - wait.start_s for wait in waits]),
        codec=total(unit.codec for unit in units),
        links=total(routine for unit in units for routine in unit.routines),
        copies_s=sum(unit.copies_s for unit in units),
        units=tuple(sorted(units, key=lambda unit: -abs(unit.work.difference_s))),
    )


def check_run(plan: Plan, run: RunTrace, plan_name: str, run_name: str) -> None:
    """Raise MismatchError or FileError unless the run had this plan and holds a whole step."""
    if run.plan != plan.seal:
        raise MismatchError(
            f"{run_name} was recorded under the plan with seal {run.plan}, {plan_name} has seal {plan.seal}; "
            "give the plan that ran, or record a run of this one"
        )
    if [(unit.unit, unit.option, unit.numel) for unit in run.units] != [
        (unit.unit, unit.option, unit.numel) for unit in run_units(plan)
    ]:
        raise FileError(f"{run_name}: its units are not those of {plan_name}, whose seal it has; record it again")
    if not run.steps:
        raise FileError(f"{run_name}: holds no whole step; train for two steps or more, the first only sets the clock")


def _prediction(plan: Plan, name: str) -> StepPrediction:
    if plan.step is None:
        raise FileError(
            f"{name}: holds no prediction for its units, an older version made it; make it again with `{plan.MADE_BY}`"
        )
    expected = [len(Option.parse(group[0].option).actions) for group in plan.units()]
    if [len(unit.actions_s) for unit in plan.step.units] != expected:
        raise FileError(f"{name}: its predictions are of other units; it was edited, so make it again with `{plan.MADE_BY}`")
    return plan.step


@dataclass
class _Way:
    """One unit in one recorded step."""

    ready_s: float
    done_s: float
    actions_s: list[float]
    copies_s: float = 0.0


def _ways(run: RunTrace, step: RunStep, count: int, name: str) -> list[_Way]:
    """What each unit of the plan did in a step, its chunks together."""
    ready, submitted, done = (moments(run, step, mark) for mark in (Mark.READY, Mark.SUBMITTED, Mark.DONE))
    ways: list[_Way | None] = [None] * count
    for place, unit in enumerate(run.units):
        times = [time for time in (ready[place], submitted[place]) if time is not None]
        way = ways[unit.unit]
        if way is None and times:
            ways[unit.unit] = way = _Way(times[0], 0.0, [0.0] * len(Option.parse(unit.option).actions))
        end = done[place]
        if way is None or end is None:
            raise FileError(f"{name}: step {step.step} has no ready or no done of {unit.label!r}; record the run again")
        way.done_s = max(way.done_s, end)
    known = [way for way in ways if way is not None]
    for work in at_work(run, step):
        way, seconds = known[run.units[work.unit].unit], work.end_s - work.start_s
        if work.action in COPIES:
            way.copies_s += seconds
        else:
            way.actions_s[work.action] += seconds
    return known


def _unit(
    number: int, tensors: Sequence[TensorDecision], predicted: UnitPrediction, after_s: float, ways: Sequence[_Way]
) -> UnitComparison:
    actions = Option.parse(tensors[0].option).actions
    return UnitComparison(
        unit=number,
        tensors=tuple(tensor.name for tensor in tensors),
        option=tensors[0].option,
        ready=_pair(predicted.ready_s + after_s, [way.ready_s for way in ways]),
        done=_pair(predicted.done_s + after_s, [way.done_s for way in ways]),
        actions=tuple(
            ActionPair(
                action=str(action),
                codec=isinstance(action.at, Device),
                predicted_s=predicted.actions_s[place],
                measured_s=statistics.median(way.actions_s[place] for way in ways),
            )
            for place, action in enumerate(actions)
        ),
        copies_s=statistics.median(way.copies_s for way in ways),
    )


def _pair(predicted_s: float, measured: Sequence[float]) -> Pair:
    return Pair(predicted_s=predicted_s, measured_s=statistics.median(measured))

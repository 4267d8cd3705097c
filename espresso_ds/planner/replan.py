"""A new plan from corrected profiles, or the old one where a new one would gain next to nothing."""

from __future__ import annotations

from typing import NamedTuple

from ..core.config import Constraints, EspressoBlock
from ..core.plan import Plan
from .build import NO_CONSTRAINTS, WORTHWHILE, limits_of, make_menu, make_plan
from .menu import Choice
from .refit import Refitted
from .refit_profiles import Model, Profiles
from .search import Progress
from .step_prediction import step_prediction
from .timeline import iteration_time


class Replanned(NamedTuple):
    """The plan to run next; the seconds that the old one's decisions would take; whether they were kept."""

    plan: Plan
    old_s: float
    kept: bool


def replan(
    plan: Plan,
    refitted: Refitted,
    *,
    made_by: str,
    uncompressed: bool = False,
    thrift: float = EspressoBlock().thrift,
    constraints: Constraints = NO_CONSTRAINTS,
    error_budget: float | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Replanned:
    """Plan again with corrected profiles.

    The old decisions were measured, new ones are only promised. So the old ones are kept, where they are still allowed, unless
    new ones shorten the step by more than is within its noise, and lengthen it by no more than that under any contention that
    the run cannot rule out: a plan that loads links or cores as the old one never did depends on these. Planning over and over
    thus comes to rest.

    Args:
        plan: the plan that ran.
        refitted: profiles corrected by a run of it.
        made_by, uncompressed, thrift, constraints, error_budget, progress: as in `make_plan`.

    Raises:
        FileError, MismatchError: as `make_plan`.
    """
    new = make_plan(
        *refitted.profiles,
        made_by=made_by,
        uncompressed=uncompressed,
        thrift=thrift,
        constraints=constraints,
        error_budget=error_budget,
        progress=progress,
    )
    model = Model.of(plan, refitted.profiles)
    old_s = iteration_time(*model)
    gains = new.predicted.planned_s < old_s * (1 - WORTHWHILE)
    safe = all(_step_s(new, doubt) < _step_s(plan, doubt) * (1 + WORTHWHILE) for doubt in refitted.doubts)
    if (gains and safe) or not _still_allowed(model, uncompressed, constraints, error_budget):
        return Replanned(new, old_s, False)
    predicted = new.predicted.model_copy(update={"planned_s": old_s, "planned_bytes": plan.predicted.planned_bytes})
    kept = {"tensors": plan.tensors, "predicted": predicted, "step": step_prediction(*model)}
    return Replanned(new.model_copy(update=kept).sealed(), old_s, True)


def _still_allowed(model: Model, uncompressed: bool, constraints: Constraints, error_budget: float | None) -> bool:
    """Whether the old decisions are among those that new ones are chosen from."""
    if uncompressed and any(unit.option.compresses for unit in model.units):
        return False
    menu = make_menu(model.trace, model.costs, constraints)
    there = all(Choice(unit.option, unit.codec) in menu.place for unit in model.units)
    return there and limits_of(model.trace, menu, constraints, error_budget).allow_all(model.units)


def _step_s(plan: Plan, profiles: Profiles) -> float:
    return iteration_time(*Model.of(plan, profiles))

"""How fast the model computed in a run, and how much codec work and busy links slowed its backward down.

The timeline's backward makes progress at the rate 1 / (1 + c [a codec works] + l (links at work)), c and l being the contentions.
In a run it is known when codecs and links were at work, so for any c and l the seconds between two moments of backward turn into
progress. What the trace says of that progress, s times its own seconds, is what c, l and the speed s have to explain:

    sum over the classes k of the time between the moments:  T_k / (1 + c codecs_k + l links_k)  =  s * (traced seconds)

Three numbers from as many equations as there are units. Where all moments were disturbed alike the three cannot be told apart, so
they are held to what was known before: the profiles' contentions, and the speed of what comes before backward. In the end s is
such that backward as a whole takes what was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..core.option import Level
from ..core.profile import ModelTrace
from ..core.run_trace import Mark
from .cost import LINKS, Costs, Resource
from .measured import backward_of, moments
from .refit_runs import Evidence
from .refit_work import Served
from .timeline import Unit

_SPEED, _CONTENTION = 0.1, 0.3
"""How far the logarithm of the speed, and a contention, are from what was known before, usually."""
_NOISE = 0.1
"""The same of a unit's ready time, over the time since the one before."""
_ROUNDS = 3
DOUBT = 2.0
"""Deviations of a contention beyond which the run rules it out."""
CLASSES = np.array([(codec, links) for codec in (0, 1) for links in (0, 1, 2)], dtype=float)
"""(codecs at work, links at work), the columns of `T_k`."""


class Compute(NamedTuple):
    """Factors on the trace's seconds before and during backward, and contentions. `known`: whether the run marks its backward."""

    before: float
    backward: float
    contention: float
    link_contention: float
    known: bool

    def progress(self, spent_s: NDArray[np.float64]) -> NDArray[np.float64]:
        """Seconds of undisturbed backward, from those spent in each of `CLASSES` (last axis)."""
        return spent_s @ (1.0 / (1.0 + CLASSES @ np.array([self.contention, self.link_contention])))


def fit_compute(
    found: Evidence, work: Sequence[Sequence[Served]], units: Sequence[Unit], trace: ModelTrace, costs: Costs
) -> tuple[Compute, list[Compute]]:
    """Fit the four numbers; return what fits best, and what the run cannot rule out: contentions off by `DOUBT` deviations.

    Args:
        found: the run.
        work: of each step, on the rank that was slowest in it.
        units: the plan's.
        trace: tensors in the order on the wire.
        costs: as they were thought to be.
    """
    from scipy.optimize import OptimizeResult, least_squares  # takes 0.3 s to import

    known = all(backward_of(step) is not None for step in found.run.steps)
    before_s = trace.forward_s + trace.after_s
    ready = [unit.ready_s for unit in units]
    targets = np.diff([0.0, *ready, max(trace.backward_s, ready[-1])])
    for number, unit in enumerate(units):
        routines = sum(isinstance(action.at, Level) for action in unit.option.actions)
        targets[number + 1] += costs.handling_s * routines * len(unit.pieces(costs.world))
    speed = 1.0
    if known:
        begun = float(np.median([step.whole(Mark.BACKWARD).start_s for step in found.run.steps]))
        speed = begun / before_s if before_s > 0 else 1.0
    else:
        targets[0] += before_s
    firsts = [next(place for place, each in enumerate(found.run.units) if each.unit == number) for number in range(len(units))]
    spent = np.mean([_spent(found, step, served, firsts) for step, served in enumerate(work)], axis=0)
    usual = _NOISE * np.sqrt((targets + 1e-3 * targets.sum()) * targets.sum() / len(targets))
    start = np.array([np.log(np.clip(speed, 0.1, 10.0)), costs.contention, costs.link_contention])
    deviation = np.array([_SPEED, _CONTENTION, _CONTENTION])

    def missed(parameters: NDArray[np.float64]) -> NDArray[np.float64]:
        backward, contention, link_contention = parameters
        tried = Compute(speed, float(np.exp(backward)), contention, link_contention, known)
        return (tried.progress(spent) - tried.backward * targets) / usual

    def fitted(noise: float) -> OptimizeResult:
        def residuals(parameters: NDArray[np.float64]) -> NDArray[np.float64]:
            return np.concatenate([missed(parameters) / noise, (parameters - start) / deviation])

        return least_squares(residuals, start, bounds=([-5.0, 0.0, 0.0], np.maximum([5.0, 20.0, 20.0], 2 * start)))

    noise = 1.0
    for _ in range(_ROUNDS):  # a run that scatters more than usual says less
        result = fitted(noise)
        noise = max(1.0, float(np.sqrt(np.mean(missed(result.x) ** 2))))
    deviations = np.sqrt(np.diag(np.linalg.inv(result.jac.T @ result.jac)))

    def settled(contention: float, link_contention: float) -> Compute:
        with_these = Compute(speed, 1.0, max(0.0, contention), max(0.0, link_contention), known)
        backward = float(with_these.progress(spent).sum() / targets.sum())
        return with_these._replace(backward=backward, before=speed if known else backward)

    _, contention, link_contention = map(float, result.x)
    _, off, link_off = (DOUBT * float(deviation) for deviation in deviations)
    others = [(contention + sign * off, link_contention) for sign in (-1, 1)]
    others += [(contention, link_contention + sign * link_off) for sign in (-1, 1)]
    return settled(contention, link_contention), [settled(*other) for other in others]


def _spent(found: Evidence, number: int, served: Sequence[Served], firsts: Sequence[int]) -> NDArray[np.float64]:
    """Seconds between the moments of a step's backward, shape (units + 1, classes): its start, each unit ready, its end."""
    step = found.run.steps[number]
    backward, end = backward_of(step), step.whole(Mark.FLUSH).start_s
    ready, submitted = (moments(found.run, step, mark) for mark in (Mark.READY, Mark.SUBMITTED))
    start = 0.0 if backward is None else backward.start_s
    seen = (next(time for time in (ready[first], submitted[first], start) if time is not None) for first in firsts)
    at = accumulate(seen, max, initial=start)
    marks = np.minimum([*at, end], end)
    inner = [time for piece in served for time in (piece.start_s, piece.end_s) if marks[0] < time < marks[-1]]
    edges = np.unique([*marks, *inner])
    middles = (edges[:-1] + edges[1:]) / 2
    codecs = np.minimum(_under_way(served, {Resource.CPU}, middles), 1)
    links = np.minimum(sum(_under_way(served, {link}, middles) for link in LINKS), 2)
    spent = np.zeros((len(marks) - 1, len(CLASSES)))
    np.add.at(spent, (np.searchsorted(marks, middles) - 1, codecs * 3 + links), np.diff(edges))
    return spent


def _under_way(served: Sequence[Served], resources: set[Resource], times: NDArray[np.float64]) -> NDArray[np.int64]:
    """How much work there is on the resources at each time."""
    mine = [piece for piece in served if piece.resource in resources]
    starts, ends = (np.sort([getattr(piece, key) for piece in mine]) for key in ("start_s", "end_s"))
    return np.searchsorted(starts, times, "right") - np.searchsorted(ends, times, "right")

"""Measured samples as curves: straight lines between samples, and beyond them by rules that suit what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..core.errors import FileError
from ..core.profile import CodecTimes, RoutineCost


@dataclass(frozen=True)
class Curve:
    """A piecewise linear function of a size: through the points (x, y), the first of which is at x = 0, and on with `slope`."""

    x: tuple[float, ...]
    y: tuple[float, ...]
    slope: float

    @cached_property
    def _points(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return np.asarray(self.x, dtype=float), np.asarray(self.y, dtype=float)

    def __call__(self, sizes: ArrayLike) -> NDArray[np.float64]:
        """Values at the sizes, of the same shape."""
        x, y = self._points
        sizes = np.asarray(sizes, dtype=float)
        return np.interp(sizes, x, y) + self.slope * np.maximum(0.0, sizes - x[-1])

    def never_falling(self) -> Curve:
        """The curve with every dip filled from the right: nowhere above what some larger size takes."""
        lowest = tuple(np.minimum.accumulate(self._points[1][::-1])[::-1].tolist())
        return self if lowest == self.y else replace(self, y=lowest)

    def least_rate(self, most: float) -> float:
        """The least value per unit of size, at any size in (0, most]: where a buffer of many tensors is cheapest per element."""
        sizes = np.array([*(x for x in self.x if 0 < x < most), most])
        return float((self(sizes) / sizes).min())


def routine_curve(cost: RoutineCost) -> Curve:
    """Seconds over the bytes that one rank puts in.

    Below the first sample a line to alpha at zero bytes; above the last, the slope beta of the fit. Both join the samples without
    a step, so that a fit which is a little off never makes more bytes cost less. Raises FileError at samples that are not sound.
    """
    check_samples(f"cluster profile: {cost.routine}.{cost.level} of {cost.ranks} ranks", cost.nbytes, cost.seconds)
    seconds = undisturbed(cost.nbytes, cost.seconds)
    return Curve((0.0, *cost.nbytes), (min(cost.alpha_s, seconds[0]), *seconds), cost.beta_s_per_byte)


def codec_curve(numel: Sequence[int], seconds: Sequence[float]) -> Curve:
    """Seconds over elements: below the first sample its time (overhead rules there), above the last in proportion."""
    return Curve((0.0, *numel), (seconds[0], *seconds), seconds[-1] / numel[-1])


def payload_curve(times: CodecTimes) -> Curve:
    """Payload bytes over elements: the lines through the outer samples go on at both ends."""
    x, y = times.numel, times.payload_nbytes
    if len(x) == 1:
        return Curve((0.0, x[0]), (0.0, y[0]), y[0] / x[0])
    first, last = (y[1] - y[0]) / (x[1] - x[0]), (y[-1] - y[-2]) / (x[-1] - x[-2])
    return Curve((0.0, *x), (max(0.0, y[0] - first * x[0]), *y), max(0.0, last))


def undisturbed(nbytes: Sequence[int], seconds: Sequence[float]) -> tuple[float, ...]:
    """The samples of a routine with those that stick out by over a quarter lowered to the line between their neighbours.

    Disturbances only ever add time, and a routine's curve has no peaks: a sample in the middle that costs much more than its
    neighbours suggest was disturbed, and would scare the planner away from that size.
    """
    kept = list(seconds)
    for place in range(1, len(kept) - 1):
        span = nbytes[place + 1] - nbytes[place - 1]
        line = kept[place - 1] + (kept[place + 1] - kept[place - 1]) * (nbytes[place] - nbytes[place - 1]) / span
        if kept[place] > 1.25 * line:
            kept[place] = line
    return tuple(kept)


def check_samples(where: str, xs: Sequence[int], *columns: Sequence[float]) -> None:
    """Raise FileError unless there are samples, columns of equal length, and ascending sizes."""
    if not xs or any(len(column) != len(xs) for column in columns):
        lengths = ", ".join(str(len(column)) for column in (xs, *columns))
        raise FileError(f"{where}: sample columns have lengths {lengths}, which must be equal and not 0; measure again")
    if any(after <= before for before, after in pairwise(xs)):
        raise FileError(f"{where}: sample sizes {list(xs)} do not ascend; measure again")

"""Corrections of what codecs and routines cost, from what they took in a run: seconds = offset per call + scale * predicted.

Few numbers, and each for a class: those of one codec's encoding on one device, of all routines of one link. What a run did not
use is corrected like the worst of its kind, so that nothing looks better merely because what was used turned out to be slower.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

SHORT_S = 2e-5
"""Seconds that a call is off by however short it is; more weight than that gives it no small unit gets."""
USUAL = 0.5
"""Corrections are usually within exp(+-0.5) of 1; the less sure one is against that, the nearer it is put to 1."""
FLOOR = 0.02
"""What a scale cannot be known better than, whatever its scatter."""
ONE_UNIT = 0.2
"""Usual scatter of units, where there are too few to see it."""
OFFSET_NEEDS, OFFSET_RANGE = 4, 4.0
"""Units, and the ratio of their longest to their shortest prediction per call, that tell an offset from a scale."""


@dataclass(frozen=True)
class Sample:
    """What one unit's calls took together: predicted, and measured step by step; seconds."""

    calls: int
    predicted_s: float
    measured_s: tuple[float, ...]

    @property
    def middle_s(self) -> float:
        """The median step."""
        return statistics.median(self.measured_s)


@dataclass(frozen=True)
class Line:
    """seconds = offset_s per call + scale * predicted; `units` it was seen in, `sure` of it, from 0 (not at all) to 1."""

    offset_s: float = 0.0
    scale: float = 1.0
    units: int = 0
    sure: float = 0.0

    def __call__(self, seconds: float, calls: int = 1) -> float:
        """The corrected seconds."""
        return calls * self.offset_s + self.scale * seconds


NONE = Line()


def fit(samples: Sequence[Sample], usual: float = USUAL, offset: bool = True) -> Line:
    """The line through the samples: such that their sum comes out, and with an offset the mean of their ratios too.

    So the scatter of a unit is taken to grow with the square root of its time. Without any sample, the line that changes nothing.
    """
    samples = [sample for sample in samples if sample.predicted_s > 0 and sample.middle_s > 0]
    if not samples:
        return NONE
    line = _with_offset(samples) if offset else None
    if line is None:
        line = Line(0.0, sum(s.middle_s for s in samples) / sum(s.predicted_s for s in samples))
    sure = _sure(samples, line, usual)
    return Line(line.offset_s * sure, line.scale**sure, len(samples), sure)


def worst(lines: Sequence[Line]) -> Line:
    """The one that makes a call slowest, for what was not seen itself; a kind of which nothing was seen stays as it is."""
    seen = [line for line in lines if line.units]
    return Line(max(line.offset_s for line in seen), max(line.scale for line in seen)) if seen else NONE


def never_faster(line: Line) -> Line:
    """The same, but for a scale below 1: what another link or codec gained is not this one's."""
    return Line(line.offset_s, max(1.0, line.scale))


def _with_offset(samples: Sequence[Sample]) -> Line | None:
    """Weighted least squares; None where the samples do not tell the two apart, or the offset would be negative."""
    each = [sample.predicted_s / sample.calls for sample in samples]
    if len(samples) < OFFSET_NEEDS or max(each) < OFFSET_RANGE * min(each):
        return None
    cc = cp = pp = cm = pm = 0.0
    for sample in samples:
        weight = 1.0 / (sample.predicted_s + sample.calls * SHORT_S)
        calls, predicted, measured = sample.calls, sample.predicted_s, sample.middle_s
        cc, cp, pp = cc + weight * calls**2, cp + weight * calls * predicted, pp + weight * predicted**2
        cm, pm = cm + weight * calls * measured, pm + weight * predicted * measured
    whole = cc * pp - cp**2
    offset_s, scale = (cm * pp - pm * cp) / whole, (pm * cc - cm * cp) / whole
    return Line(offset_s, scale) if offset_s > 0 and scale > 0 else None


def _sure(samples: Sequence[Sample], line: Line, usual: float) -> float:
    """How far to follow a line: the share of the usual variance in that and the line's own."""
    ratios = [math.log(sample.middle_s / line(sample.predicted_s, sample.calls)) for sample in samples]
    weights = [sample.predicted_s for sample in samples]
    scatter = (
        math.sqrt(sum(w * r**2 for w, r in zip(weights, ratios, strict=True)) / sum(weights)) if len(samples) > 2 else ONE_UNIT
    )
    effective = sum(weights) ** 2 / sum(weight**2 for weight in weights)
    steady = [
        (w, statistics.stdev(math.log(max(second, 1e-9)) for second in s.measured_s))
        for w, s in zip(weights, samples, strict=True)
        if len(s.measured_s) > 1
    ]
    of_steps = sum(w * d for w, d in steady) / sum(w for w, _ in steady) if steady else ONE_UNIT
    count = max(len(sample.measured_s) for sample in samples)
    variance = FLOOR**2 + scatter**2 / effective + of_steps**2 / count
    return usual**2 / (usual**2 + variance)

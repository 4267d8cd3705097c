"""What every benchmark of training keeps of one way to train."""

from __future__ import annotations

import statistics

from pydantic import Field, PositiveFloat

from espresso_ds.core.record import Record


class TimedSteps(Record):
    """Steps of one way to train.

    Attributes:
        step_s: seconds of each timed step, of the slowest rank.
        predicted_s: the plan's step, where there is one.
    """

    step_s: list[PositiveFloat] = Field(min_length=1)
    predicted_s: PositiveFloat | None = None

    @property
    def median_s(self) -> float:
        """Median step."""
        return statistics.median(self.step_s)

"""What the benchmark writes: a file for each model, number of stages and rate."""

from __future__ import annotations

import statistics
from typing import ClassVar

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from espresso_ds.core.record import FileRecord, Record

PLAIN, BF16, OURS = "deepspeed", "deepspeed, bf16 on the wire", "planned"


class Variant(Record):
    """One way to train.

    Attributes:
        step_s: seconds of each timed step, of the slowest stage.
        sent_bytes: bytes of a step that left the busiest host, by its interface's counter, median.
        predicted_s: the timeline's step.
    """

    step_s: list[PositiveFloat] = Field(min_length=1)
    sent_bytes: NonNegativeFloat
    predicted_s: PositiveFloat | None = None

    @property
    def median_s(self) -> float:
        """Median step."""
        return statistics.median(self.step_s)


class CellResult(FileRecord):
    """All variants of one model with so many stages at one rate, interleaved in one run."""

    KIND: ClassVar[str] = "pipeline speed result"
    MADE_BY: ClassVar[str] = "python -m benchmarks.pipeline_speed"

    schema_version: int = 1
    model: str
    stages: PositiveInt
    rate: str
    machine: dict[str, str | int | float]
    rounds: PositiveInt
    decided: list[str]
    variants: dict[str, Variant]

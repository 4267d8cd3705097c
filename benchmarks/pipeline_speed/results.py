"""What the benchmark writes: a file for each model, number of stages and rate."""

from __future__ import annotations

from typing import ClassVar

from pydantic import NonNegativeFloat, PositiveInt

from espresso_ds.core.record import FileRecord

from ..timed import TimedSteps

PLAIN, BF16, OURS = "deepspeed", "deepspeed, bf16 on the wire", "planned"


class Variant(TimedSteps):
    """One way to train.

    Attributes:
        sent_bytes: bytes of a step that left the busiest host, by its interface's counter, median.
    """

    sent_bytes: NonNegativeFloat


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

"""What was corrected after a run, why, and how well the corrected profiles explain the run: the file beside a replanned plan."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ..core.record import FileRecord, Record
from .compare import Comparison, Pair


class Correction(Record):
    """seconds = offset_s (per call, step or unit) + scale * what the profile said. `samples`: units or steps it was seen in."""

    what: str
    scale: float = 1.0
    offset_s: float = 0.0
    samples: int
    why: str


class Row(Record):
    """One quantity of the step that ran: predicted by the plan, measured, and predicted with the corrections; seconds."""

    what: str
    before_s: float
    measured_s: float
    after_s: float


class Refit(FileRecord):
    """Corrections of a plan's profiles from a run."""

    KIND: ClassVar[str] = "refit"
    MADE_BY: ClassVar[str] = "espresso replan"

    schema_version: Literal[1] = 1
    plan: str = Field(description="seal of the plan that ran")
    ranks: tuple[int, ...] = Field(description="whose traces were given")
    steps: tuple[int, ...] = Field(description="numbers of those that count")
    corrections: tuple[Correction, ...]
    rows: tuple[Row, ...]
    unexplained: float = Field(description="share of the step that is an overhead of no part of it")
    notes: tuple[str, ...] = Field(description="for people")


def explained(before: Comparison, after: Comparison) -> tuple[Row, ...]:
    """The rows from comparisons of one run with the old and the corrected prediction."""

    def row(what: str, old: Pair, new: Pair, copies_s: float = 0.0) -> Row:
        return Row(what=what, before_s=old.predicted_s, measured_s=old.measured_s + copies_s, after_s=new.predicted_s)

    compressed = {unit.unit for unit in before.units if any(action.codec for action in unit.actions)}
    of_codecs = sum(unit.copies_s for unit in before.units if unit.unit in compressed)
    return (
        row("step", before.step, after.step),
        row("until backward ends", before.backward_end, after.backward_end),
        row("waiting for synchronisation after it", before.exposed, after.exposed),
        row("codec work, and copies of compressed units", before.codec, after.codec, of_codecs),
        row("links at work, and copies of the other units", before.links, after.links, before.copies_s - of_codecs),
    )

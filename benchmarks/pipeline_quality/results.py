"""What the study writes: a file for each model, with every run that is finished."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import BeforeValidator, Field, PositiveFloat

from espresso_ds.core.errors import FileError
from espresso_ds.core.record import FileRecord, Record

Evaluation = Literal["compressed", "uncompressed"]


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Figure = Annotated[float | None, BeforeValidator(_finite)]
"""None: training diverged."""


class Run(Record):
    """One training.

    Attributes:
        method: its name.
        settings: of "pipeline"; None: plain DeepSpeed.
        seed: of weights and of the order of examples.
        compressed: the metric, evaluated as trained.
        uncompressed: the metric, evaluated without compression.
        training_loss: mean of the last epoch.
        seconds: of training and both evaluations.
    """

    method: str
    settings: dict[str, Any] | None
    seed: int
    compressed: Figure
    uncompressed: Figure
    training_loss: Figure
    seconds: PositiveFloat


class Spread(NamedTuple):
    """A figure over the seeds.

    Attributes:
        mean: infinite if any run diverged.
        deviation: standard, of the sample; None for a single seed.
    """

    mean: float
    deviation: float | None


class Study(FileRecord):
    """All runs of a model."""

    KIND: ClassVar[str] = "pipeline quality result"
    MADE_BY: ClassVar[str] = "python -m benchmarks.pipeline_quality"

    schema_version: int = 1
    model: str
    metric: str
    setup: dict[str, int | float]
    machine: dict[str, str | int | float]
    runs: list[Run] = Field(default_factory=list)

    def having(self, run: Run) -> Study:
        """The same with one run more."""
        return self.model_copy(update={"runs": [*self.runs, run]})

    def done(self) -> set[tuple[str, int]]:
        """Methods and seeds of finished runs."""
        return {(run.method, run.seed) for run in self.runs}

    def spread(self, method: str, evaluation: Evaluation) -> Spread | None:
        """The metric over the seeds; None where the method did not run."""
        values = [getattr(run, evaluation) for run in self.runs if run.method == method]
        return spread(values) if values else None

    def seeds(self) -> list[int]:
        """Those of any run."""
        return sorted({run.seed for run in self.runs})


def spread(values: Sequence[float | None]) -> Spread:
    """Mean and deviation of values of which None stands for a run that diverged."""
    finite = [value for value in values if value is not None]
    if len(finite) < len(values):
        return Spread(math.inf, None)
    return Spread(statistics.fmean(finite), statistics.stdev(finite) if len(finite) > 1 else None)


def open_study(path: Path, fresh: Study) -> Study:
    """What a file has of a study, or the fresh one. Raises FileError where it was made with another setup."""
    if not path.exists():
        return fresh
    found = Study.load(path)
    if found.setup != fresh.setup:
        raise FileError(f"{path}: made with {found.setup}, not {fresh.setup}; move it away")
    return found


def load_studies(folder: Path) -> list[Study]:
    """All of a folder. Raises FileError where there are none."""
    found = [Study.load(path) for path in sorted(folder.glob("*.json"))]
    if not found:
        raise FileError(f"{folder}: no results; make them with `{Study.MADE_BY}`")
    return found

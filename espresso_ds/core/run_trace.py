"""The run trace: what every action of the runtime took in the last steps of a run, as measured on one rank.

`espresso compare` lays it beside the plan. Times count from the moment at which the gradients of the step before were
synchronised: what a step takes is the time between two such moments, with the optimizer, the data and the forward pass in it.
"""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar, Literal, NamedTuple, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from .chunks import chunk_lengths
from .option import Option
from .plan import OptionText, Plan
from .record import FileRecord, Record

TRACE_ENV = "ESPRESSO_TRACE_RUN"
NO_UNIT = -1


class Mark(IntEnum):
    """What a span is that is no action of an option. READY, SUBMITTED and DONE are moments: their start is their end."""

    READY = -1
    """The last gradient of the unit is complete; recorded for its first chunk."""
    SUBMITTED = -2
    """The unit may go: it and all units before it are ready."""
    COPY_IN = -3
    """Gradients are copied into the unit's buffer, cast and scaled."""
    COPY_OUT = -4
    """The sums are scaled and copied back into the gradients."""
    DONE = -5
    """The chunk's gradients hold their sum."""
    FLUSH = -6
    """Of the whole step: from the end of backward until all units are done."""
    BACKWARD = -7
    """Of the whole step: the backward whose gradients are synchronised, where its start is known."""


WHOLE_STEP = frozenset({Mark.FLUSH, Mark.BACKWARD})


class RunSpan(NamedTuple):
    """Seconds from the synchronisation of the step before. `unit` counts `RunTrace.units` (-1: the whole step), `action` the
    actions of its option (negative: a `Mark`). A routine's span runs from its issue until this rank has seen it complete.
    """

    unit: int
    action: int
    start_s: float
    end_s: float


class RunUnit(Record):
    """What travels as one buffer: a unit of the plan, or one of its chunks."""

    label: str
    unit: NonNegativeInt = Field(description="of the plan")
    tensors: tuple[str, ...] = Field(min_length=1)
    numel: PositiveInt
    option: OptionText
    codec: str | None = Field(description="for people; None where the option does not compress")


class RunStep(Record):
    """One optimizer step: its number in the run, and its spans by the time at which they ended."""

    step: NonNegativeInt
    spans: tuple[RunSpan, ...]

    @property
    def seconds(self) -> float:
        """From the synchronisation of the step before to that of this one."""
        return self.whole(Mark.FLUSH).end_s

    def whole(self, mark: Mark) -> RunSpan:
        """The step's one span of FLUSH, or of BACKWARD if that was recorded (ValueError if not)."""
        found = next((span for span in self.spans if span.action == mark), None)
        if found is None:
            raise ValueError(f"step {self.step} has no {mark.name.lower()}")
        return found


class RunTrace(FileRecord):
    """The last whole steps of a run."""

    KIND: ClassVar[str] = "run trace"
    MADE_BY: ClassVar[str] = f"{TRACE_ENV}=run-trace.json deepspeed --espresso_config plan.json train.py"

    schema_version: Literal[1] = 1
    made_by: str
    plan: str = Field(description="seal of the plan that ran")
    rank: NonNegativeInt
    world_size: PositiveInt
    nodes: PositiveInt
    device: str = Field(description="where the model computes: cpu or cuda")
    clock: Literal["host"] = Field(
        "host", description="times of the host's threads; on CUDA an action's span is that of launching it, not of its kernels"
    )
    units: tuple[RunUnit, ...] = Field(description="in the order on the wire")
    steps: tuple[RunStep, ...]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.rank >= self.world_size:
            raise ValueError(f"rank {self.rank} is not one of {self.world_size} ranks")
        actions = [len(Option.parse(unit.option).actions) for unit in self.units]
        for step in self.steps:
            step.whole(Mark.FLUSH)
            for span in step.spans:
                _check(span, actions, f"step {step.step}")
        return self


def _check(span: RunSpan, actions: list[int], where: str) -> None:
    """Raise ValueError at a span of no known unit or action, or one that ends before it starts."""
    whole = span.action in WHOLE_STEP
    if whole != (span.unit == NO_UNIT) or not NO_UNIT <= span.unit < len(actions):
        raise ValueError(f"{where}: {span} is of no unit of the run")
    if not min(Mark) <= span.action < (0 if whole else actions[span.unit]):
        raise ValueError(f"{where}: {span} is of no action of its unit's option")
    if span.end_s < span.start_s:
        raise ValueError(f"{where}: {span} ends before it starts")


def run_units(plan: Plan) -> tuple[RunUnit, ...]:
    """What travels as one buffer under a plan, in the order on the wire: units, and chunks of those that travel in chunks."""
    found = []
    for number, tensors in enumerate(plan.units()):
        first, more = tensors[0], len(tensors) - 1
        compresses = Option.parse(first.option).compresses
        numel = sum(tensor.numel for tensor in tensors)
        lengths = chunk_lengths(numel, first.chunk_numel if compresses else None, plan.made_for.world_size)
        label = first.name + (f" (+{more})" if more else "")
        found += [
            RunUnit(
                label=label if len(lengths) == 1 else f"{label} [{place}]",
                unit=number,
                tensors=tuple(tensor.name for tensor in tensors),
                numel=length,
                option=first.option,
                codec=plan.compressors[first.codec].label if compresses else None,
            )
            for place, length in enumerate(lengths)
        ]
    return tuple(found)

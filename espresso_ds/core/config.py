"""The "espresso" block that users may write into their DeepSpeed JSON config: what to plan with. All keys have defaults."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from .record import Record


class CompressorSettings(Record):
    """Which codec, how strong, and its error memory."""

    name: str = Field("topk", description="name in the codec registry")
    density: float | None = Field(None, gt=0, le=1, description="sparsifiers: share of elements kept")
    bits: PositiveInt | None = Field(None, le=8, description="quantizers: bits per element")
    feedback: Literal["ef", "none"] = "ef"
    seed: int = 0

    @property
    def label(self) -> str:
        """Short text for people, such as `topk density=0.01, ef`."""
        strength = [f"{key}={value:g}" for key, value in (("density", self.density), ("bits", self.bits)) if value is not None]
        return f"{' '.join([self.name, *strength])}, {'error feedback' if self.feedback == 'ef' else 'no error feedback'}"


class Constraints(Record):
    """What the planner must keep to (E 4.2: users may prune the option tree)."""

    max_compressions: NonNegativeInt | None = Field(None, description="most compressions of one tensor on its way")
    forbid: tuple[str, ...] = Field(
        (), description="what no option may hold: an action (A2A.inter), a task (GA) or a place (cpu, intra)"
    )
    flat_only: bool = Field(False, description="no hierarchical options")
    exact: tuple[str, ...] = Field((), description="patterns (*norm*, *.bias) of tensors that are never compressed")
    summable_only: bool = Field(False, description="only codecs whose payloads can be summed")
    residual_bytes: NonNegativeInt | None = Field(None, description="most memory of one rank for error feedback")


class EspressoBlock(Record):
    """The block without its plan. `plan`, written by `espresso plan`, is kept raw here and read by `core.plan`."""

    enabled: bool = True
    compressor: CompressorSettings = CompressorSettings()
    alternatives: tuple[CompressorSettings, ...] = Field(
        (), description="further codecs or densities that the planner may give to single tensors"
    )
    error_budget: float | None = Field(
        None, gt=0, le=1, description="most relative error, as the mean over all elements, that compression may make"
    )
    constraints: Constraints = Constraints()
    thrift: float = Field(
        0.01,
        ge=0,
        le=1,
        description="share of the step given for leaving uncompressed what compression helps least",
    )
    timeout_s: PositiveFloat = Field(600.0, description="deadline of every wait for other ranks")
    plan: dict | None = None

    @model_validator(mode="before")
    @classmethod
    def _object(cls, value: object) -> object:
        if not isinstance(value, dict):
            raise ValueError('the "espresso" block is a JSON object')
        return value

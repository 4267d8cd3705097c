"""The "espresso" block that users may write into their DeepSpeed JSON config: what to plan with. All keys have defaults."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from .record import Record

FeedbackMode = Literal["ef", "ef21", "dgc", "aqsgd", "none"]
STRENGTH = ("density", "bits", "rank", "range", "format", "vote", "warmup_steps")
"""The settings that are parameters of some codecs and senseless for the others."""


class CompressorSettings(Record):
    """Which codec, how strong, and its error memory."""

    name: str = Field("topk", description="name in the codec registry")
    density: float | None = Field(None, gt=0, le=1, description="sparsifiers: share of elements kept")
    bits: PositiveInt | None = Field(None, le=8, description="quantizers: bits per element")
    rank: PositiveInt | None = Field(None, description="PowerSGD: rank of the approximation")
    range: Literal["minmax", "absmax"] | None = Field(None, description="quantize: what the grid of a block spans")
    format: Literal["e4m3", "e5m2"] | None = Field(None, description="fp8: bits of exponent and mantissa")
    vote: Literal["majority", "mean"] | None = Field(None, description="signsgd: what becomes of the ranks' signs")
    warmup_steps: NonNegativeInt | None = Field(None, description="dgc: optimizer steps in which the density falls to its value")
    feedback: FeedbackMode | None = Field(None, description="error memory (default: the codec's own)")
    residual: Literal["float32", "bfloat16"] = Field("float32", description="dtype of the error memory (default: float32)")
    momentum: float = Field(0.9, ge=0, lt=1, description="feedback dgc: momentum, in place of the optimizer's (default: 0.9)")
    clip: float | None = Field(None, gt=0, description="feedback dgc: most norm of what is compressed at once, over all ranks")
    seed: int = 0

    @property
    def label(self) -> str:
        """Short text for people, such as `topk density=0.01, ef`."""
        given = {key: getattr(self, key) for key in STRENGTH if getattr(self, key) is not None}
        strength = [f"{key}={value}" if isinstance(value, str) else f"{key}={value:g}" for key, value in given.items()]
        memory = {None: "its own feedback", "ef": "error feedback", "none": "no error feedback"}.get(self.feedback, self.feedback)
        memory = f"{memory} in {self.residual}" if self.residual != "float32" else memory
        return f"{' '.join([self.name, *strength])}, {memory}"


def check_for_gradients(compressors: Iterable[CompressorSettings]) -> None:
    """Raise ValueError at one that gradients cannot have."""
    if any(each.feedback == "aqsgd" for each in compressors):
        raise ValueError('"feedback": "aqsgd" remembers activations between pipeline stages; gradients have "ef" and "ef21"')


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
    boundary_density: float = Field(0.1, gt=0, le=1, description="least density of TopK between pipeline stages")
    boundary_aqsgd_density: float = Field(0.3, gt=0, le=1, description="the same of activations with AQ-SGD")
    milder_backward: bool = Field(True, description="gradients between pipeline stages lose less than activations")


class GuardSettings(Record):
    """The first steps of a run, in which the plan is measured against sending everything uncompressed."""

    enabled: bool = Field(True, description="measure, and drop what does not pay")
    steps: int = Field(16, ge=8, description="most optimizer steps that measuring takes, warm-up included")


class BoundarySettings(Record):
    """What crosses between two pipeline stages; null: as it is."""

    forward: CompressorSettings | None = Field(None, description="codec of activations")
    backward: CompressorSettings | None = Field(None, description="codec of their gradients")
    shared_indices: bool = Field(False, description="gradients only where the activations' TopK has chosen, without indices")

    @model_validator(mode="after")
    def _one_way_back(self) -> BoundarySettings:
        if self.shared_indices and (self.forward is None or self.forward.density is None or self.backward is not None):
            raise ValueError('"shared_indices" takes a "forward" with a "density", such as topk, and no "backward" of its own')
        if self.backward is not None and self.backward.feedback == "aqsgd":
            raise ValueError('"feedback": "aqsgd" remembers activations of examples; give "backward" another')
        return self


class PipelineSettings(BoundarySettings):
    """Compression between pipeline stages."""

    boundaries: dict[NonNegativeInt, BoundarySettings] = Field(
        {}, description='other settings for single boundaries: "0" is the one between stages 0 and 1'
    )
    feedback: Literal["none", "ef", "ef21", "aqsgd"] = Field(
        "none", description="what the planner gives to codecs of activations"
    )
    per_example: bool = Field(False, description="compress each example of a micro-batch by itself")
    evaluation: Literal["as trained", "uncompressed"] = Field("as trained", description="what eval_batch does")
    examples: Literal["content", "position"] = Field(
        "content", description="what tells AQ-SGD the examples apart, unless batches have a third item, their numbers"
    )
    example_memory: Literal["float32", "bfloat16", "8 bits"] = Field("float32", description="how AQ-SGD keeps them")
    example_bytes: PositiveInt = Field(4 << 30, description="most memory of AQ-SGD for one direction on one rank")

    @model_validator(mode="after")
    def _one_who_decides(self) -> PipelineSettings:
        if self.feedback != "none" and (self.forward is not None or self.boundaries):
            raise ValueError(f'"feedback": "{self.feedback}" beside codecs is for the planner; write it into the codec')
        return self


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
    guard: GuardSettings = GuardSettings()
    pipeline: PipelineSettings | None = Field(None, description="for a PipelineModule: what crosses between its stages")
    timeout_s: PositiveFloat = Field(600.0, description="deadline of every wait for other ranks")
    any_cluster: bool = Field(False, description="train on other hosts, networks or backends than the plan was made for")
    plan: dict | None = None

    @model_validator(mode="before")
    @classmethod
    def _object(cls, value: object) -> object:
        if not isinstance(value, dict):
            raise ValueError('the "espresso" block is a JSON object')
        return value

    @model_validator(mode="after")
    def _for_gradients(self) -> EspressoBlock:
        check_for_gradients((self.compressor, *self.alternatives))
        return self

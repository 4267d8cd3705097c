"""The plan: one decision per tensor, what it was made for and what it promises. Lives in a DeepSpeed JSON config."""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveInt, field_validator

from .config import CompressorSettings, EspressoBlock, PipelineSettings, check_for_gradients
from .errors import FileError
from .hosts import ClusterKind
from .option import Option
from .record import FileRecord, Record, fingerprint, load_json, write_json

BLOCK = "espresso"
_SHARED = ("option", "codec", "chunk_numel", "dtype")  # by the tensors of a unit


def _valid_option(text: str) -> str:
    try:
        Option.parse(text)
    except FileError as error:
        raise ValueError(str(error)) from None
    return text


OptionText = Annotated[str, AfterValidator(_valid_option)]


class TensorDecision(Record):
    """What happens to one tensor. Tensors of one `unit` follow each other, share an option and travel as one buffer."""

    name: str
    shape: tuple[NonNegativeInt, ...]
    dtype: str
    numel: PositiveInt
    option: OptionText
    codec: NonNegativeInt = Field(0, description="which of the plan's compressors, where the option compresses")
    unit: NonNegativeInt
    chunk_numel: PositiveInt | None = Field(None, description="the compressed unit travels in chunks of about so many elements")
    firings: PositiveInt = 1
    saves_s: float = Field(0.0, description="predicted step time lost if this tensor's unit were sent uncompressed instead")
    why: str = Field("", description="the planner's reason, for people")


class MadeFor(Record):
    """What the plan holds for; a run that differs is stopped at start."""

    nodes: PositiveInt
    ranks_per_node: PositiveInt
    model: str = Field(description="fingerprint of parameter names, shapes and dtypes")
    config: dict[str, str | int | float | bool] = Field(description="DeepSpeed settings that the times depend on")
    cluster: ClusterKind | None = Field(None, description="hosts, network and backend that were profiled")

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.nodes * self.ranks_per_node


class Prediction(Record):
    """Predicted seconds per optimizer step, and bytes that one rank sends in it."""

    compute_s: NonNegativeFloat = Field(description="without any synchronisation: the upper bound")
    stock_s: NonNegativeFloat = Field(description="DeepSpeed as it is: uncompressed, after backward")
    uncompressed_s: NonNegativeFloat = Field(description="uncompressed, overlapped with backward")
    planned_s: NonNegativeFloat
    uncompressed_bytes: NonNegativeInt
    planned_bytes: NonNegativeInt
    lower_bound_s: NonNegativeFloat = Field(description="no strategy at all can be faster than this, by this model")
    free_compression_s: NonNegativeFloat = Field(description="the best plan found if compression took no time: E's upper bound")

    @property
    def gap(self) -> float:
        """Certified: by which share of the lower bound the plan may be slower than the best of all strategies."""
        return self.planned_s / self.lower_bound_s - 1


class UnitPrediction(Record):
    """One unit's way through the predicted step: seconds, to the microsecond."""

    ready_s: NonNegativeFloat = Field(description="from the start of the step until its gradients are complete")
    done_s: NonNegativeFloat = Field(description="from the start of the step until they are synchronised")
    actions_s: tuple[NonNegativeFloat, ...] = Field(description="each action of the option at work, all chunks together")


class StepPrediction(Record):
    """What to expect of a run in detail: the step unit by unit, and memory beside model and optimizer on the busiest rank."""

    backward_end_s: NonNegativeFloat = Field(description="from the start of the step")
    synced_s: NonNegativeFloat = Field(description="from the start of the step until all gradients are synchronised")
    after_s: NonNegativeFloat = Field(description="the optimizer, after that")
    feedback_bytes: NonNegativeInt = Field(description="what error feedback remembers")
    buffer_bytes: NonNegativeInt = Field(description="payloads and flat buffers")
    units: tuple[UnitPrediction, ...] = Field(description="in the order on the wire")


class PipelineDecision(Record):
    """What crosses between pipeline stages, and which of the plan's tensors belong to which stage."""

    stages: int = Field(ge=2)
    micro_batches: PositiveInt
    settings: PipelineSettings
    tensors: tuple[NonNegativeInt, ...] = Field(description="how many of the plan's tensors each stage has, in this order")
    why: tuple[str, ...] = Field((), description="the planner's reason for each boundary, for people")


class Plan(FileRecord):
    """Decisions in the order on the wire. `seal` is the hash of all else: an edited plan is noticed."""

    KIND: ClassVar[str] = "plan"
    MADE_BY: ClassVar[str] = "espresso plan"

    schema_version: Literal[1] = 1
    made_by: str
    made_for: MadeFor
    profiles: dict[str, str] = Field(description="fingerprints of the trace, cluster and compressor profiles")
    compressors: tuple[CompressorSettings, ...] = Field(min_length=1)
    predicted: Prediction
    tensors: tuple[TensorDecision, ...]
    step: StepPrediction | None = None
    pipeline: PipelineDecision | None = None
    seal: str = ""

    @field_validator("compressors")
    @classmethod
    def _for_gradients(cls, value: tuple[CompressorSettings, ...]) -> tuple[CompressorSettings, ...]:
        check_for_gradients(value)
        return value

    def sealed(self) -> Plan:
        """The same plan with its seal set to the hash of all other fields."""
        return self.model_copy(update={"seal": self._hash()})

    def _hash(self) -> str:
        # Plans without fields that were added later keep the seal that they were given.
        exclude: dict[str, Any] = {"seal": True}
        for name in ("step", "pipeline"):
            if getattr(self, name) is None:
                exclude[name] = True
        if self.made_for.cluster is None:
            exclude["made_for"] = {"cluster": True}
        return fingerprint(self.model_dump(mode="json", exclude=exclude))

    def units(self) -> list[tuple[TensorDecision, ...]]:
        """Tensors grouped by unit, in the order on the wire."""
        groups: dict[int, list[TensorDecision]] = {}
        for tensor in self.tensors:
            groups.setdefault(tensor.unit, []).append(tensor)
        return [tuple(group) for group in groups.values()]

    def of_stage(self, stage: int) -> Plan:
        """The plan of one stage of a pipeline: its tensors alone, unsealed."""
        assert self.pipeline is not None
        start = sum(self.pipeline.tensors[:stage])
        return self.model_copy(update={"tensors": self.tensors[start : start + self.pipeline.tensors[stage]], "step": None})

    def check(self, where: str) -> None:
        """Raise FileError at a broken seal, a name that stands twice, or a unit that is split, mixed or of two stages."""
        if self.seal != self._hash():
            raise FileError(
                f"{where}: the plan was edited after it was made (seal {self.seal!r}, content {self._hash()!r}); "
                f"make it again with `espresso plan`, or accept the edit with `espresso seal {where}`"
            )
        names = [tensor.name for tensor in self.tensors]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise FileError(f"{where}: tensor {twice!r} stands twice in the plan")
        for before, after in zip(self.tensors, self.tensors[1:], strict=False):
            if after.unit not in (before.unit, before.unit + 1):
                raise FileError(f"{where}: tensor {after.name!r} has unit {after.unit} after unit {before.unit}")
            fault = next((key for key in _SHARED if getattr(before, key) != getattr(after, key)), None)
            if after.unit == before.unit and fault:
                raise FileError(f"{where}: tensors {before.name!r} and {after.name!r} share unit {after.unit}, but not {fault}")
        if self.pipeline is not None:
            self._check_stages(self.pipeline, where)
        if odd := next((tensor for tensor in self.tensors if tensor.codec >= len(self.compressors)), None):
            raise FileError(
                f"{where}: tensor {odd.name!r} has codec {odd.codec}, but the plan has {len(self.compressors)} compressors"
            )

    def _check_stages(self, pipeline: PipelineDecision, where: str) -> None:
        if len(pipeline.tensors) != pipeline.stages or sum(pipeline.tensors) != len(self.tensors):
            raise FileError(
                f"{where}: {pipeline.stages} stages with {list(pipeline.tensors)} tensors, but the plan has {len(self.tensors)}"
            )
        for first in set(accumulate(pipeline.tensors)) - {0, len(self.tensors)}:
            if self.tensors[first - 1].unit == self.tensors[first].unit:
                raise FileError(f"{where}: tensor {self.tensors[first].name!r} shares a unit with one of the stage before")


def read_block(ds_config: dict[str, Any], where: str) -> EspressoBlock | None:
    """The config's "espresso" block, or None where there is none. Raises FileError."""
    return EspressoBlock.read(ds_config[BLOCK], f"{where}: {BLOCK}") if BLOCK in ds_config else None


def plan_of(block: EspressoBlock, where: str, check_seal: bool = True) -> Plan:
    """The plan in a block. Raises FileError where there is none or it is not sound."""
    if block.plan is None:
        raise FileError(f'{where}: the "espresso" block has no plan yet; make one with `espresso prepare --ds-config {where}`')
    plan = Plan.from_json(block.plan, where)
    if check_seal:
        plan.check(where)
    return plan


def load_plan_file(path: str | Path) -> tuple[dict[str, Any], EspressoBlock, Plan]:
    """Read plan.json: the DeepSpeed config, its espresso block and the plan in it. Raises FileError."""
    config = load_json(path, Plan.KIND, "espresso prepare")
    block = read_block(config, str(path)) if isinstance(config, dict) else None
    if block is None:
        raise FileError(f'{path}: holds no "espresso" block; make a plan with `espresso prepare --ds-config {path} -o plan.json`')
    return config, block, plan_of(block, str(path))


def save_plan_file(path: str | Path, ds_config: dict[str, Any], block: EspressoBlock, plan: Plan) -> None:
    """Write the DeepSpeed config, untouched but for its espresso block, with the sealed plan in it; atomically."""
    written = block.model_dump(mode="json", exclude_none=True)
    written["plan"] = json.loads(plan.sealed().model_dump_json())
    write_json(path, {**ds_config, BLOCK: written})

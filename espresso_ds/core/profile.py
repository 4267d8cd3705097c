"""What was measured of the model, the cluster and the codecs. Times in seconds, sizes in bytes or elements."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from .config import CompressorSettings
from .errors import UnsupportedError
from .hosts import ClusterKind, Host
from .option import Device, Level, Task
from .record import FileRecord, Record, fingerprint

MOST = 1e15
"""Seconds, and seconds per byte, that no measurement exceeds: what is larger is a mistake, and its sums would overflow."""
MOST_NUMEL = 2**40

Seconds = Annotated[float, Field(ge=0, le=MOST)]
PositiveSeconds = Annotated[float, Field(gt=0, le=MOST)]
Numel = Annotated[int, Field(gt=0, le=MOST_NUMEL)]
Nbytes = Annotated[int, Field(gt=0, le=16 * MOST_NUMEL)]


class TracedTensor(Record):
    """One trainable parameter, as seen by the gradient hooks of an uncompressed run."""

    name: str
    shape: tuple[NonNegativeInt, ...]
    dtype: str = Field(description="torch's name of the gradient's dtype, such as float32")
    numel: Numel
    ready_s: Seconds = Field(description="from the start of backward until the gradient is complete; mean over steps")
    firings: PositiveInt = Field(1, description="how often its hook fires in one backward (more than 1: reentrant checkpointing)")


class TracedStage(Record):
    """One stage of a pipeline: seconds of a micro-batch's passes and of what follows all of them, on its slowest replica."""

    host: NonNegativeInt = Field(description="number of the host of its first replica")
    forward_s: Seconds
    backward_s: Seconds
    after_s: Seconds = Field(
        description="from all passes to the next step: the optimizer, and what the script does between steps"
    )
    tensors: NonNegativeInt = Field(description="how many of the trace's tensors it trains")


class TracedBoundary(Record):
    """What crosses between two stages for a micro-batch: elements of each floating-point tensor, and bytes of one as it is."""

    forward_numel: tuple[Numel, ...] = Field(min_length=1)
    backward_numel: tuple[Numel, ...]
    element_bytes: PositiveInt
    examples: PositiveInt = Field(1, description="length of the first dimension")


class PipelineTrace(Record):
    """The stages of a PipelineModule and what crosses between them."""

    micro_batches: PositiveInt
    stages: tuple[TracedStage, ...] = Field(min_length=2)
    boundaries: tuple[TracedBoundary, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _in_a_row(self) -> PipelineTrace:
        if len(self.boundaries) != len(self.stages) - 1:
            raise ValueError(f"{len(self.stages)} stages have {len(self.stages) - 1} boundaries, not {len(self.boundaries)}")
        return self


class ModelTrace(FileRecord):
    """Gradient sizes and ready times of one model under one config, synchronisation left out (E 4.4)."""

    KIND: ClassVar[str] = "model trace"
    MADE_BY: ClassVar[str] = "espresso trace"

    schema_version: Literal[1] = 1
    model: str = Field(description="class or name, for people")
    device: Literal["cpu", "cuda"] = Field(description="where the model computes")
    world_size: PositiveInt
    ranks_per_node: PositiveInt
    threads: PositiveInt = Field(description="compute threads of each rank")
    cores: PositiveInt = Field(description="cores of one host")
    steps: PositiveInt = Field(description="optimizer steps measured")
    config: dict[str, str | int | float | bool] = Field(description="resolved DeepSpeed settings that the times depend on")
    wire_dtype: str = Field(description="dtype in which DeepSpeed would reduce gradients, such as float32")
    forward_s: Seconds = Field(
        description="everything before the backward that is synchronised: data, forward, earlier micro-batches"
    )
    backward_s: PositiveSeconds = Field(description="duration of the backward that is synchronised")
    after_s: Seconds = Field(description="clipping, optimizer and all else after backward")
    spread: NonNegativeFloat = Field(0.0, description="interquartile range of the step time over its median")
    tensors: tuple[TracedTensor, ...] = Field(
        description="in the order in which gradients become ready; of a pipeline, stage by stage, from each one's last backward"
    )
    pipeline: PipelineTrace | None = Field(None, description="of a PipelineModule; the times above are then of its slowest stage")

    @property
    def fingerprint(self) -> str:
        """Short hash of the content; that of a file from before there were pipelines stays what it was."""
        return fingerprint(self.model_dump(mode="json", exclude={"pipeline"} if self.pipeline is None else None))

    def without_stages(self, what: str) -> ModelTrace:
        """The trace itself. Raises UnsupportedError where it is of a pipeline, for whatever cannot be done for those yet."""
        if self.pipeline is not None:
            raise UnsupportedError(
                f"{what} of a model with pipeline stages cannot be done yet; `espresso plan` and `explain` can"
            )
        return self

    @property
    def compute_s(self) -> float:
        """Step time with no synchronisation at all: the upper bound of what compression can reach."""
        return self.forward_s + self.backward_s + self.after_s

    @property
    def model_fingerprint(self) -> str:
        """Hash of parameter names, shapes and dtypes, whatever their order."""
        return model_fingerprint((t.name, t.shape, t.dtype) for t in self.tensors)


class RoutineCost(Record):
    """Measured seconds of one routine, and the alpha-beta line through them.

    `nbytes` is what one rank puts in: the whole tensor for AR, RS, RD and BC, one payload for AG and GA, all rows for A2A.
    """

    routine: Task
    level: Level
    ranks: PositiveInt = Field(description="ranks of one group: all, those of a node, or one of every node")
    groups: PositiveInt = Field(1, description="groups of the level that ran it at once and shared each node's network card")
    nbytes: tuple[Nbytes, ...]
    seconds: tuple[PositiveSeconds, ...] = Field(description="medians, one for each of nbytes")
    alpha_s: Seconds
    beta_s_per_byte: Seconds
    fit_error: NonNegativeFloat = Field(description="median of |fit - measured| / measured")
    spread: tuple[NonNegativeFloat, ...] = Field((), description="interquartile range over median, one for each of nbytes")


class Link(Record):
    """Point-to-point latency and inverse bandwidth between two ranks, by alpha-beta fit of send/recv."""

    alpha_s: Seconds
    beta_s_per_byte: Seconds
    fit_error: NonNegativeFloat
    nbytes: tuple[Nbytes, ...] = ()
    seconds: tuple[PositiveSeconds, ...] = Field((), description="medians of one message, one for each of nbytes")
    spread: tuple[NonNegativeFloat, ...] = Field((), description="interquartile range over median, one for each of nbytes")


class MpiCost(Record):
    """Measured seconds of one operation of the MPI library; `nbytes` as in `RoutineCost`. For people: the planner ignores it."""

    operation: Literal["allreduce", "allgather", "alltoall", "send"]
    nbytes: tuple[Nbytes, ...]
    seconds: tuple[PositiveSeconds, ...]
    spread: tuple[NonNegativeFloat, ...]


class RawMpi(Record):
    """What MPI itself makes of the same links, between all ranks; `send` between two, on different hosts if there are several."""

    library: str = Field(description="name and version")
    costs: tuple[MpiCost, ...]


class HostSpeed(Record):
    """What one host can do: its best rate to and from any other host that was tried, and its slowest rank's computing."""

    up_bytes_per_s: PositiveFloat | None = Field(None, description="None on a single host")
    down_bytes_per_s: PositiveFloat | None = None
    products_per_s: PositiveFloat = Field(description="products of two fixed matrices, by each of its ranks at the same time")


class PairRate(Record):
    """The rate from one host to another; numbers of hosts."""

    sender: NonNegativeInt
    receiver: NonNegativeInt
    bytes_per_s: PositiveFloat


class ClusterProfile(FileRecord):
    """Links and collective routines of a cluster, measured with the backend that training uses."""

    KIND: ClassVar[str] = "cluster profile"
    MADE_BY: ClassVar[str] = "espresso profile cluster"

    schema_version: Literal[1] = 1
    backend: str
    hosts: tuple[str, ...]
    ranks_per_node: PositiveInt
    contention: Seconds = Field(
        0.0, description="seconds by which one second of communication delays the computing that runs at the same time"
    )
    handling_s: Seconds = Field(
        0.0, description="by which each routine delays that computing, whatever its size: hooks, threads, calls"
    )
    links: dict[Level, Link] = Field(description="intra where a node has two ranks, inter where there are two nodes")
    routines: tuple[RoutineCost, ...]
    facts: tuple[Host, ...] = Field((), description="one for each of hosts")
    speeds: tuple[HostSpeed, ...] = Field((), description="one for each of hosts")
    pairs: tuple[PairRate, ...] = ()
    mpi: RawMpi | None = None
    remarks: tuple[str, ...] = Field((), description="stragglers, asymmetric links, large spreads, for people")
    took_s: NonNegativeFloat | None = Field(None, description="how long measuring took, start-up of the ranks not counted")

    @property
    def kind(self) -> ClusterKind | None:
        """What a plan made from this profile is kept to; None where the facts of its hosts are not in the file."""
        there = [(host.name, host.slots) for host in self.facts]
        return ClusterKind.of(self.backend, self.facts) if there == [(name, self.ranks_per_node) for name in self.hosts] else None

    @property
    def fingerprint(self) -> str:
        """Short hash of the content; that of a file from before a field was added stays what it was."""
        return fingerprint(_without_absent(self.model_dump(mode="json")))

    @property
    def nodes(self) -> int:
        """Number of hosts."""
        return len(self.hosts)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.nodes * self.ranks_per_node


class CodecTimes(Record):
    """Encode and decode seconds by tensor size on one device; encoding includes error feedback."""

    device: Device
    numel: tuple[Numel, ...]
    payload_nbytes: tuple[Nbytes, ...]
    encode_s: tuple[PositiveSeconds, ...]
    decode_s: tuple[PositiveSeconds, ...] = Field(description="decode one payload of a sum of two")
    contention: Seconds = Field(
        description="seconds by which one second of codec work delays the computing that runs at the same time"
    )


class CodecProfile(Record):
    """What one codec costs on this cluster's hosts, and what it loses."""

    compressor: CompressorSettings
    summable: bool = Field(description="whether payloads may be summed by an allreduce")
    votes: bool = Field(False, description="whether decoding needs the payloads of all ranks at once")
    keeps_scale: bool = Field(True, description="whether what is decoded is as large as what was encoded, at least in the mean")
    relative_error: NonNegativeFloat = Field(
        description="|x - decode(encode(x))|^2 / |x|^2 of normally distributed x: 0 loses nothing, 1 all"
    )
    devices: tuple[CodecTimes, ...]


class CompressorProfile(FileRecord):
    """The codecs that a plan may choose from; the first is the one asked for, the others are alternatives to it."""

    KIND: ClassVar[str] = "compressor profile"
    MADE_BY: ClassVar[str] = "espresso profile compressors"

    schema_version: Literal[1] = 1
    codecs: tuple[CodecProfile, ...] = Field(min_length=1)


_ADDED = {"spread", "facts", "speeds", "pairs", "mpi", "remarks", "took_s"}
"""Keys of a cluster profile that its first version had not, besides a link's sizes and times."""


def _without_absent(value: Any) -> Any:
    """Decoded JSON of a cluster profile without added keys that hold nothing."""
    if isinstance(value, list):
        return [_without_absent(each) for each in value]
    if not isinstance(value, dict):
        return value
    added = _ADDED | ({"nbytes", "seconds"} if "routine" not in value else set())
    return {key: _without_absent(each) for key, each in value.items() if key not in added or each not in ([], None)}


def model_fingerprint(tensors) -> str:  # noqa: ANN001 - any iterable of (name, shape, dtype)
    """Hash of (name, shape, dtype name) triples, independent of their order."""
    return fingerprint(sorted([name, list(shape), dtype] for name, shape, dtype in tensors))

"""What was measured of the model, the cluster and the codecs. Times in seconds, sizes in bytes or elements."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from .config import CompressorSettings
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
    tensors: tuple[TracedTensor, ...] = Field(description="in the order in which gradients become ready")

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


class Link(Record):
    """Point-to-point latency and inverse bandwidth between two ranks, by alpha-beta fit of send/recv."""

    alpha_s: Seconds
    beta_s_per_byte: Seconds
    fit_error: NonNegativeFloat


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
    links: dict[Level, Link] = Field(description="intra where a node has two ranks, inter where there are two nodes")
    routines: tuple[RoutineCost, ...]

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
    decode_s: tuple[PositiveSeconds, ...] = Field(description="decode one payload and add it to the sum")
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


def model_fingerprint(tensors) -> str:  # noqa: ANN001 - any iterable of (name, shape, dtype)
    """Hash of (name, shape, dtype name) triples, independent of their order."""
    return fingerprint(sorted([name, list(shape), dtype] for name, shape, dtype in tensors))

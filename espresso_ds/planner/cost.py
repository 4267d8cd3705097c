"""What every action costs: seconds on a resource and bytes sent, from measured samples only (E 4.3, "empirical models").

`operations` follows one tensor of n elements through the actions of an option, with the runtime's state: what this rank is in
charge of (n / d elements: all, or a shard) and, where it is packed, how many payload rows it holds of n / e elements each. p is
the size of the routine's group: all ranks, those of a node, or one of every node.

| action | works on                                  | takes                 | leaves         | mean bytes sent per rank |
|--------|-------------------------------------------|-----------------------|----------------|--------------------------|
| C      | n/d elements, cut into the k rows that the alltoalls before the next D hand out | k encodings of n/(d k) | k rows |   |
| D      | the rows that the rank holds              | 1 decoding a row      | dense          |                          |
| AR     | n/d elements, or one summable payload     | AR of its bytes       | the same       | 2 (p-1)/p of them        |
| RS     | n/d elements                              | RS of its bytes       | d p            | (p-1)/p of them          |
| AG     | n/d elements, or r rows                   | AG of its bytes       | d / p, or r p rows | (p-1) times that     |
| A2A    | r rows, r/p for each rank                 | A2A of all rows       | r rows, d p    | (p-1)/p of them          |
| RD, GA | n/d elements; r rows, the root gets r p   | RD, GA of its bytes   | the root goes on | (p-1)/p of them        |
| BC     | n/d elements, or r rows of the root       | BC of its bytes       | the same       | (p-1)/p of them          |

An inter-node routine has as many groups as ranks of a node are in charge of something: all after RS or A2A inside the node, one
(the root's) after RD or GA. Groups share the node's network card, and are measured so. Bytes sent are means over ranks, and roots
rotate from unit to unit. The bandwidth-optimal algorithm is counted for AR. Seconds are those of the busiest rank: a root's codec
work is charged in full, although only every p-th unit has its root here. Rows are padded to 16 bytes on the wire; that is not
counted. What it takes to start an operation is in the samples: in alpha, and in the codec's time for the smallest tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..core.errors import FileError, nearest
from ..core.option import Action, Device, Level, Option, Task
from ..core.profile import ClusterProfile, CodecProfile, CompressorProfile
from .curves import Curve, check_samples, codec_curve, payload_curve, routine_curve

WIRE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of one element on the wire, uncompressed, by torch's name of the dtype."""


class Resource(IntEnum):
    """What an action occupies. Codec work on the device of the tensor occupies the compute resource.

    Flat routines occupy the link between nodes, or inside the node where there is only one.
    """

    COMPUTE = 0
    CPU = 1
    INTRA = 2
    INTER = 3


LINKS = (Resource.INTRA, Resource.INTER)


class Shape(NamedTuple):
    """Number of nodes, and ranks of each."""

    nodes: int
    ranks_per_node: int

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.nodes * self.ranks_per_node

    def ranks(self, level: Level) -> int:
        """Size of a group of the level."""
        return {Level.FLAT: self.world, Level.INTRA: self.ranks_per_node, Level.INTER: self.nodes}[level]


class Operation(NamedTuple):
    """An action with all that its cost depends on but the number of elements n.

    It handles `rows` payloads of ceil(n / divisor) elements each, or ceil(n / divisor) elements as they are (rows = 0).
    """

    action: Action
    rows: int
    divisor: int
    codec: int
    payload_of: Device | None  # where the rows were encoded
    groups: int
    share: float  # of the ranks that take part

    @property
    def task(self) -> Task:
        """What is done."""
        return self.action.task


class Step(NamedTuple):
    """One action of a unit: which resource it occupies and for how many seconds."""

    action: Action
    resource: Resource
    seconds: float


@dataclass(frozen=True)
class Walk:
    """An option applied to n elements: its steps in order, and the mean number of bytes that a rank sends."""

    steps: tuple[Step, ...]
    sent_bytes: float

    @cached_property
    def lean(self) -> tuple[tuple[int, float], ...]:
        """(resource, seconds) of each step, for the simulator."""
        return tuple((int(step.resource), step.seconds) for step in self.steps)


@lru_cache(maxsize=1 << 15)
def operations(option: Option, codec: int, shape: Shape) -> tuple[Operation, ...]:
    """The actions of an option with what their costs depend on; see the table above."""
    divisor, rows, row_divisor, device = 1, 0, 1, None
    rooted = False  # only the node's root is in charge, between the routines inside the node
    found = []
    for number, action in enumerate(option.actions):
        task, at = action.task, action.at
        if isinstance(at, Device):
            if task is Task.COMPRESS:
                rows, device = _rows(option.actions[number + 1 :], shape), at
                row_divisor = divisor * rows
            found.append(Operation(action, rows, row_divisor, codec, device, 1, 1.0))
            rows = 0 if task is Task.DECOMPRESS else rows
            continue
        size = shape.ranks(at)
        active = 1 if rooted and at is Level.INTER else shape.ranks_per_node
        groups = active if at is Level.INTER else 1
        share = active / shape.ranks_per_node
        found.append(Operation(action, rows, row_divisor if rows else divisor, codec, device if rows else None, groups, share))
        if task in (Task.REDUCE_SCATTER, Task.ALLTOALL):
            divisor *= size
        elif task is Task.ALLGATHER and _is_second(option.actions[:number], at):
            divisor //= size
        if rows and task in (Task.ALLGATHER, Task.GATHER):
            rows *= size
        if at is Level.INTRA:
            rooted = task in (Task.REDUCE, Task.GATHER)
    return tuple(found)


def _rows(following: Sequence[Action], shape: Shape) -> int:
    """Into how many payloads a compression cuts its elements: the parts that alltoalls hand out before the next D."""
    rows = 1
    for action in following:
        if action.task is Task.DECOMPRESS:
            break
        if action.task is Task.ALLTOALL and isinstance(action.at, Level):
            rows *= shape.ranks(action.at)
    return rows


def _is_second(before: Sequence[Action], level: Level) -> bool:
    """Whether an allgather at this level completes a divisible scheme."""
    return any(action.at is level for action in before)


_SENT = {
    Task.ALLREDUCE: lambda ranks: 2 * (ranks - 1) / ranks,
    Task.REDUCE_SCATTER: lambda ranks: (ranks - 1) / ranks,
    Task.ALLGATHER: lambda ranks: ranks - 1,
    Task.ALLTOALL: lambda ranks: (ranks - 1) / ranks,
    Task.REDUCE: lambda ranks: (ranks - 1) / ranks,
    Task.GATHER: lambda ranks: (ranks - 1) / ranks,
    Task.BROADCAST: lambda ranks: (ranks - 1) / ranks,
}
"""Mean bytes sent per rank, over the bytes that one rank puts in, as a function of the number of ranks of the group."""


class Costs:
    """Seconds and bytes of routines and codec tasks, looked up in a cluster profile and a compressor profile."""

    def __init__(self, cluster: ClusterProfile, compressors: CompressorProfile, wire_dtype: str = "float32") -> None:
        """Index the profiles.

        Args:
            cluster: measured routines.
            compressors: measured codec times and payload sizes.
            wire_dtype: dtype in which uncompressed gradients travel, from the model trace.

        Raises:
            FileError: `wire_dtype` is unknown, or a profile's samples are torn or out of order.
        """
        if wire_dtype not in WIRE_BYTES:
            raise FileError(f"model trace: wire_dtype is {wire_dtype!r}{nearest(wire_dtype, WIRE_BYTES)}")
        self.shape = Shape(cluster.nodes, cluster.ranks_per_node)
        self.world = cluster.world_size
        self.element_bytes = WIRE_BYTES[wire_dtype]
        self.link_contention = cluster.contention
        self.handling_s = cluster.handling_s
        self.codecs: tuple[CodecProfile, ...] = compressors.codecs
        self.contention = max(
            (t.contention for codec in self.codecs for t in codec.devices if t.device is Device.CPU), default=0.0
        )
        """Seconds by which one second of codec work on the CPU delays the backward that runs at the same time."""
        self._routines = {(cost.routine, cost.level, cost.ranks, cost.groups): routine_curve(cost) for cost in cluster.routines}
        self._encode: dict[tuple[int, Device], Curve] = {}
        self._decode: dict[tuple[int, Device], Curve] = {}
        self._payload: dict[tuple[int, Device], Curve] = {}
        for number, codec in enumerate(self.codecs):
            for times in codec.devices:
                where = f"compressor profile: {codec.compressor.name} on device {times.device}"
                check_samples(where, times.numel, times.payload_nbytes, times.encode_s, times.decode_s)
                self._encode[number, times.device] = codec_curve(times.numel, times.encode_s)
                self._decode[number, times.device] = codec_curve(times.numel, times.decode_s)
                self._payload[number, times.device] = payload_curve(times)
        self._walks: dict[tuple[Option, int, int], Walk] = {}

    @property
    def delays(self) -> tuple[float, float, float]:
        """What slows the backward, as `play` takes it: contention, link_contention, handling_s."""
        return self.contention, self.link_contention, self.handling_s

    def with_free_codecs(self) -> Costs:
        """The same costs but for compression and decompression, which take no time."""
        free = copy(self)
        free.contention = 0.0
        free._encode = dict.fromkeys(self._encode, Curve((0.0,), (0.0,), 0.0))
        free._decode = dict.fromkeys(self._decode, Curve((0.0,), (0.0,), 0.0))
        free._walks = {}
        return free

    def never_falling(self) -> Costs:
        """The same costs with every curve's dips filled: what a buffer takes at least, at this size or any larger one."""
        lower = copy(self)
        for name in ("_routines", "_encode", "_decode", "_payload"):
            setattr(lower, name, {key: curve.never_falling() for key, curve in getattr(self, name).items()})
        lower._walks = {}
        return lower

    def walk(self, option: Option, numel: int, codec: int = 0) -> Walk:
        """Steps and bytes of `option` for a buffer of `numel` elements; see the table above. Raises FileError."""
        key = (option, codec, numel)
        if key not in self._walks:
            done = operations(option, codec, self.shape)
            sent = sum(
                self.nbytes(op, numel) * _SENT[op.task](self.shape.ranks(op.action.at)) * op.share
                for op in done
                if isinstance(op.action.at, Level)
            )
            steps = tuple(Step(op.action, self.resource(op), float(self.seconds(op, numel))) for op in done)
            self._walks[key] = Walk(steps, float(sent))
        return self._walks[key]

    def resource(self, operation: Operation) -> Resource:
        """What the operation occupies."""
        at = operation.action.at
        if isinstance(at, Device):
            return Resource.COMPUTE if at is Device.GPU else Resource.CPU
        return Resource.INTRA if at is Level.INTRA or self.shape.nodes == 1 else Resource.INTER

    def seconds(self, operation: Operation, numel: int | NDArray) -> NDArray[np.float64]:
        """Seconds of the operation for units of `numel` elements, of the same shape. Raises FileError (not measured)."""
        seconds, _ = self.curves(operation)
        if isinstance(operation.action.at, Device):
            return operation.rows * seconds(_ceil(numel, operation.divisor))
        return seconds(self.nbytes(operation, numel))

    def curves(self, operation: Operation) -> tuple[Curve, Curve | None]:
        """What `seconds` looks up: seconds over elements or bytes, and the payload's bytes over elements. Raises FileError."""
        at = operation.action.at
        if operation.task in (Task.LEFT, Task.RIGHT):
            raise FileError(
                f"compressor profile: {operation.action} was not measured, since what PowerSGD sends depends on the shapes of "
                "tensors and not on their sizes; plan with another codec"
            )
        if isinstance(at, Device):
            return self._of(self._encode if operation.task is Task.COMPRESS else self._decode, operation.codec, at), None
        payload = None if operation.payload_of is None else self._of(self._payload, operation.codec, operation.payload_of)
        return self.routine(operation.task, at, operation.groups), payload

    def nbytes(self, operation: Operation, numel: int | NDArray) -> NDArray[np.float64]:
        """Bytes that one rank puts into a routine, as `RoutineCost` counts them. Raises FileError (not measured)."""
        elements = _ceil(numel, operation.divisor)
        if operation.payload_of is not None:
            return operation.rows * self.payload_nbytes(operation.payload_of, elements, operation.codec)
        if operation.task is Task.REDUCE_SCATTER and isinstance(operation.action.at, Level):
            ranks = self.shape.ranks(operation.action.at)
            elements = ranks * _ceil(elements, ranks)  # padded to equal shards
        return np.asarray(elements * self.element_bytes, dtype=float)

    def payload_nbytes(self, device: Device, numel: int | NDArray, codec: int = 0) -> NDArray[np.float64]:
        """Bytes of one payload of `numel` elements, of the same shape. Raises FileError (not measured)."""
        return np.maximum(1.0, self._of(self._payload, codec, device)(numel))

    def codec_s(self, work: Literal["encode", "decode"], codec: int, device: Device, numel: int) -> float:
        """Seconds of encoding or decoding one payload of `numel` elements. Raises FileError (not measured)."""
        return float(self._of(self._encode if work == "encode" else self._decode, codec, device)(numel))

    def routine(self, task: Task, level: Level, groups: int = 1) -> Curve:
        """Seconds of a routine over the bytes that one rank puts in. Raises FileError (not measured)."""
        ranks = self.shape.ranks(level)
        curve = self._routines.get((task, level, ranks, groups))
        if curve is None:
            at_once = f" in {groups} groups at once" if groups > 1 else ""
            raise FileError(
                f"cluster profile: {task}.{level} was not measured with {ranks} ranks{at_once}; "
                f"measure it with `{ClusterProfile.MADE_BY}`"
            )
        return curve

    def comm(self, task: Task, level: Level, nbytes: float) -> float:
        """Seconds of a routine into which one rank puts `nbytes`. Raises FileError (not measured)."""
        return float(self.routine(task, level)(nbytes))

    def has(self, option: Option) -> bool:
        """Whether all routines of the option were measured."""
        return all(
            (op.task, op.action.at, self.shape.ranks(op.action.at), op.groups) in self._routines
            for op in operations(option, 0, self.shape)
            if isinstance(op.action.at, Level)
        )

    def _of(self, curves: dict[tuple[int, Device], Curve], codec: int, device: Device) -> Curve:
        if (codec, device) not in curves:
            measured = ", ".join(sorted(place for number, place in curves if number == codec)) or "none"
            raise FileError(
                f"compressor profile: device {str(device)!r} was not measured (measured: {measured}); "
                f"measure it with `{CompressorProfile.MADE_BY}`"
            )
        return curves[codec, device]


def _ceil(numel: int | NDArray, divisor: int) -> int | NDArray:
    return -(-numel // divisor)

"""What every action costs: seconds on a resource and bytes sent, from measured samples only (E 4.3, "empirical models").

`Costs.walk` follows one tensor through the actions of an option, with the runtime's state: dense values or payload rows, the
whole tensor or this rank's shard of it. W is the number of ranks, n the number of elements, m = ceil(n / W) a shard.

| action          | works on                       | takes                  | mean bytes sent per rank |
|-----------------|--------------------------------|------------------------|--------------------------|
| C before A2A    | W shards, a row each           | W encodings of m       |                          |
| C otherwise     | all that the rank holds        | 1 encoding of n (or m) |                          |
| D               | the rows that the rank holds   | 1 decoding a row       |                          |
| AR              | tensor, or one summable payload| AR of its bytes        | 2 (W-1)/W of them        |
| RS              | tensor; leaves a shard         | RS of its bytes        | (W-1)/W of them          |
| AG              | shard, or r rows; leaves W r   | AG of what a rank has  | (W-1) times that         |
| A2A             | W rows; leaves W rows of m     | A2A of all rows        | (W-1)/W of them          |
| RD, GA          | tensor; a row, the root gets W | RD, GA of its bytes    | (W-1)/W of them          |
| BC              | tensor, or r rows of the root  | BC of its bytes        | (W-1)/W of them          |

Bytes sent are means over ranks, and roots rotate from unit to unit: all but the root send once in RD and GA, and in BC all but
the root receive once. The bandwidth-optimal algorithm is counted for AR. Seconds are those of the busiest rank: a root's codec
work is charged in full, although only every W-th unit has its root here. Rows are padded to 16 bytes on the wire; that is not
counted.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from typing import NamedTuple

from ..core.errors import FileError, nearest
from ..core.option import Action, Device, Level, Option, Task
from ..core.profile import ClusterProfile, CodecTimes, CompressorProfile

WIRE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of one element on the wire, uncompressed, by torch's name of the dtype."""


class Resource(IntEnum):
    """What an action occupies. Codec work on the device of the tensor occupies the compute resource."""

    COMPUTE = 0
    CPU = 1
    LINK = 2


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
    lean: tuple[tuple[int, float], ...]
    """(resource, seconds) of each step, for the inner loop of the simulator."""


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
        self.world = cluster.world_size
        self.element_bytes = WIRE_BYTES[wire_dtype]
        self.link_contention = cluster.contention
        self._ranks = {Level.FLAT: cluster.world_size, Level.INTRA: cluster.ranks_per_node, Level.INTER: cluster.nodes}
        self._routines = {(cost.routine, cost.level, cost.ranks): cost for cost in cluster.routines}
        self._codecs = {times.device: times for times in compressors.devices}
        self._walks: dict[tuple[Option, int], Walk] = {}
        for cost in cluster.routines:
            _check_samples(f"cluster profile: {cost.routine}.{cost.level} of {cost.ranks} ranks", cost.nbytes, cost.seconds)
        self._seconds = {key: undisturbed(cost.nbytes, cost.seconds) for key, cost in self._routines.items()}
        for times in compressors.devices:
            columns = (times.payload_nbytes, times.encode_s, times.decode_s)
            _check_samples(f"compressor profile: device {times.device}", times.numel, *columns)

    @property
    def contention(self) -> float:
        """Seconds by which one second of codec work on the CPU delays the backward that runs at the same time."""
        times = self._codecs.get(Device.CPU)
        return times.contention if times else 0.0

    def comm(self, routine: Task, level: Level, nbytes: float) -> float:
        """Seconds of a routine into which one rank puts `nbytes` (as `RoutineCost` counts them).

        Straight lines between samples. Below the first, a line to alpha at zero bytes; above the last, the slope beta of the fit.
        Both join the samples without a step, so that a fit which is a little off never makes more bytes cost less.

        Raises:
            FileError: the routine was not measured at that level with that many ranks.
        """
        key = routine, level, self._ranks[level]
        cost = self._routines.get(key)
        if cost is None:
            raise FileError(
                f"cluster profile: {routine}.{level} was not measured with {self._ranks[level]} ranks; "
                f"measure it with `{ClusterProfile.MADE_BY}`"
            )
        seconds = self._seconds[key]
        if nbytes <= cost.nbytes[0]:
            alpha = min(cost.alpha_s, seconds[0])
            return alpha + (seconds[0] - alpha) * nbytes / cost.nbytes[0]
        if nbytes >= cost.nbytes[-1]:
            return seconds[-1] + cost.beta_s_per_byte * (nbytes - cost.nbytes[-1])
        return _between(cost.nbytes, seconds, nbytes)

    def encode_s(self, device: Device, numel: int) -> float:
        """Seconds to compress `numel` elements into one payload, error feedback included. Raises FileError."""
        times = self._times(device)
        return _codec_seconds(times.numel, times.encode_s, numel)

    def decode_s(self, device: Device, numel: int) -> float:
        """Seconds to decompress one payload of `numel` elements and add it to a sum. Raises FileError."""
        times = self._times(device)
        return _codec_seconds(times.numel, times.decode_s, numel)

    def payload_nbytes(self, device: Device, numel: int) -> float:
        """Bytes of one payload of `numel` elements: straight lines through measured sizes, at both ends too. Raises FileError."""
        times = self._times(device)
        return max(1.0, _line(times.numel, times.payload_nbytes, numel))

    def walk(self, option: Option, numel: int) -> Walk:
        """Steps and bytes of `option` for a buffer of `numel` elements; see the table above. Raises FileError."""
        key = (option, numel)
        if key not in self._walks:
            self._walks[key] = self._walk(option, numel)
        return self._walks[key]

    def _walk(self, option: Option, numel: int) -> Walk:
        world, shard = self.world, -(-numel // self.world)
        extent = numel  # elements that the rank is in charge of: all, or a shard
        rows, row_numel, row_bytes = 0, 0, 0.0  # payloads that the rank holds; none: the tensor is dense
        steps: list[Step] = []
        sent = 0.0
        for number, action in enumerate(option.actions):
            task, at = action.task, action.at
            if isinstance(at, Device):
                if task is Task.COMPRESS:
                    per_shard = option.actions[number + 1].task is Task.ALLTOALL
                    rows, row_numel = (world, shard) if per_shard else (1, extent)
                    row_bytes = self.payload_nbytes(at, row_numel)
                    seconds = rows * self.encode_s(at, row_numel)
                else:
                    seconds = rows * self.decode_s(at, row_numel)
                    rows = 0
                steps.append(Step(action, Resource.COMPUTE if at is Device.GPU else Resource.CPU, seconds))
                continue
            packed = rows > 0
            if packed:
                nbytes = rows * row_bytes
            elif task is Task.REDUCE_SCATTER:
                nbytes = world * shard * self.element_bytes
            else:
                nbytes = extent * self.element_bytes
            steps.append(Step(action, Resource.LINK, self.comm(task, at, nbytes)))
            sent += nbytes * _SENT[task](world)
            if task in (Task.REDUCE_SCATTER, Task.ALLTOALL):
                extent = shard
            elif task is Task.ALLGATHER:
                extent = numel
            if packed and task in (Task.ALLGATHER, Task.GATHER):
                rows *= world
        return Walk(tuple(steps), sent, tuple((int(step.resource), step.seconds) for step in steps))

    def _times(self, device: Device) -> CodecTimes:
        if device not in self._codecs:
            measured = ", ".join(sorted(self._codecs)) or "none"
            raise FileError(
                f"compressor profile: device {str(device)!r} was not measured (measured: {measured}); "
                f"measure it with `{CompressorProfile.MADE_BY}`"
            )
        return self._codecs[device]


_SENT = {
    Task.ALLREDUCE: lambda world: 2 * (world - 1) / world,
    Task.REDUCE_SCATTER: lambda world: (world - 1) / world,
    Task.ALLGATHER: lambda world: world - 1,
    Task.ALLTOALL: lambda world: (world - 1) / world,
    Task.REDUCE: lambda world: (world - 1) / world,
    Task.GATHER: lambda world: (world - 1) / world,
    Task.BROADCAST: lambda world: (world - 1) / world,
}
"""Mean bytes sent per rank, over the bytes that one rank puts in, as a function of the number of ranks."""


def _between(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """The straight line through the two samples around x (the two nearest where x is outside), at least two samples."""
    right = min(max(bisect_left(xs, x), 1), len(xs) - 1)
    left = right - 1
    return ys[left] + (ys[right] - ys[left]) * (x - xs[left]) / (xs[right] - xs[left])


def _line(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    return _between(xs, ys, x) if len(xs) > 1 else ys[0] * x / xs[0]


def undisturbed(nbytes: Sequence[int], seconds: Sequence[float]) -> tuple[float, ...]:
    """The samples of a routine with those that stick out by over a quarter lowered to the line between their neighbours.

    Disturbances only ever add time, and a routine's curve has no peaks: a sample in the middle that costs much more than its
    neighbours suggest was disturbed, and would scare the planner away from that size.
    """
    kept = list(seconds)
    for place in range(1, len(kept) - 1):
        line = _between(nbytes[place - 1 :: 2][:2], (kept[place - 1], kept[place + 1]), nbytes[place])
        if kept[place] > 1.25 * line:
            kept[place] = line
    return tuple(kept)


def _codec_seconds(numels: Sequence[int], seconds: Sequence[float], numel: int) -> float:
    """Between samples a straight line; below the first its time (overhead rules there); above the last in proportion."""
    if numel <= numels[0]:
        return seconds[0]
    if numel >= numels[-1]:
        return seconds[-1] * numel / numels[-1]
    return _between(numels, seconds, numel)


def _check_samples(where: str, xs: Sequence[int], *columns: Sequence[float]) -> None:
    if not xs or any(len(column) != len(xs) for column in columns):
        lengths = ", ".join(str(len(column)) for column in (xs, *columns))
        raise FileError(f"{where}: sample columns have lengths {lengths}, which must be equal and not 0; measure again")
    if any(after <= before for before, after in pairwise(xs)):
        raise FileError(f"{where}: sample sizes {list(xs)} do not ascend; measure again")

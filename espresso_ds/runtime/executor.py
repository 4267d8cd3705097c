"""The interpreter of options: follows the actions of one unit, from this rank's gradient to the sum over all ranks (E 4.2).

A unit's buffer `x` is flat and is both input and output. Between actions the unit is either dense (values in `x`) or packed
(rows of payload bytes); it covers the whole tensor or, after a reduce-scatter or alltoall, this rank's shard of it. Schemes see
only bytes: every routine moves whole rows, and what a row decodes into is known from the rank that it came from.

All ranks decode the same rows in rank order, so all end with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..compressors.base import Codec, padded
from ..core.option import ROUTINES, Device, Option, Task
from ..feedback import Feedback
from . import routines
from .lanes import Pending, Steps

_SEED_MIX = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio: spreads consecutive step numbers over all bits


_Started = tuple[Pending, Callable[[], object]]  # a routine under way, and what to do with its result


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Compressor:
    """A codec, its error memory and the seed of its random choices. Several may share a memory: every unit has its own sites."""

    codec: Codec
    feedback: Feedback
    seed: int


@dataclass(frozen=True)
class Unit:
    """Tensors that travel as one buffer: `numel` elements in all, `index` its place in the plan, `label` its name for people and
    for its residuals, `codec` which of the executor's compressors it uses, if its option compresses.
    """

    index: int
    label: str
    numel: int
    option: Option
    codec: int = 0

    @property
    def steps(self) -> int:
        """Number of communication steps."""
        return sum(action.task in ROUTINES for action in self.option.actions)


@dataclass
class _State:
    x: Tensor
    compressor: Compressor
    seed: int
    shard: slice | None = None  # None: the unit is whole
    rows: Tensor | None = None  # uint8, (rows, stride); None: the unit is dense
    targets: list[slice] = field(default_factory=list)  # what of x each row decodes into
    summed: bool = False  # one row holds the sum of all ranks' payloads
    present: bool = True  # False: this rank holds nothing until the root broadcasts
    compressions: int = 0


class Executor:
    """Runs options over the ranks of `groups[0]`; `groups[k]` carries the k-th communication step of every unit.

    Args:
        compressors: what units choose from, alike on all ranks.
        groups: at least as many as any unit has communication steps.
        wire_dtype: of what is sent uncompressed.
    """

    def __init__(self, compressors: Sequence[Compressor], groups: Sequence[ProcessGroup], wire_dtype: torch.dtype) -> None:
        self._compressors = compressors
        self._groups = groups
        self._wire_dtype = wire_dtype
        self.rank = groups[0].rank()
        self.world = groups[0].size()

    def buffer_numel(self, unit: Unit) -> int:
        """Elements that the unit's buffer needs: a multiple of the world size where the option works on shards."""
        divisible = {Task.REDUCE_SCATTER, Task.ALLTOALL}
        if any(action.task in divisible for action in unit.option.actions):
            return -(-unit.numel // self.world) * self.world
        return unit.numel

    def run(self, unit: Unit, x: Tensor, step: int) -> Steps:
        """Sum the unit over all ranks, in place; yields each communication step once it has started.

        Args:
            unit: what to synchronise.
            x: shape (buffer_numel(unit),), contiguous; float32 where the option compresses, else any floating dtype. Elements
                past `unit.numel` must be zero.
            step: counts optimizer steps, equal on all ranks.
        """
        compressor = self._compressors[unit.codec]
        seed = (compressor.seed + (step * 2**20 + unit.index) * _SEED_MIX) % 2**63
        state = _State(x, compressor, seed)
        lane, root = 0, unit.index % self.world
        for number, action in enumerate(unit.option.actions):
            with torch.profiler.record_function(f"espresso/{action}/{unit.label}"):
                if action.task is Task.COMPRESS:
                    following = unit.option.actions[number + 1].task
                    self._encode(unit, state, action.at is Device.CPU, per_shard=following is Task.ALLTOALL)
                    continue
                if action.task is Task.DECOMPRESS:
                    if state.present:
                        self._decode(state, action.at is Device.CPU)
                    state.rows = None
                    continue
                communicate = self._communicate_dense if state.rows is None else self._communicate_rows
                pending, finish = communicate(action.task, state, self._groups[lane], root)
            lane += 1
            yield pending
            finish()

    def _encode(self, unit: Unit, state: _State, on_host: bool, per_shard: bool) -> None:
        extent = state.shard or slice(0, state.x.numel())
        state.targets = self._shards(state.x) if per_shard else [extent]
        numel = state.targets[0].stop - state.targets[0].start
        codec, feedback = state.compressor.codec, state.compressor.feedback
        nbytes = codec.payload_nbytes(numel)
        device = torch.device("cpu") if on_host else state.x.device
        rows = torch.empty(len(state.targets), padded(nbytes), dtype=torch.uint8, device=device)
        for number, target in enumerate(state.targets if state.present else ()):
            site = f"{unit.label}/{state.compressions}/{number}"
            x = state.x[target].to(device)
            feedback.encode(codec, x, rows[number, :nbytes], state.seed + state.compressions, site)
        state.rows = rows.to(state.x.device)
        state.compressions += 1

    def _decode(self, state: _State, on_host: bool) -> None:
        assert state.rows is not None
        x = state.x.cpu() if on_host else state.x
        rows = state.rows.cpu() if on_host else state.rows
        codec, fresh = state.compressor.codec, set()
        for row, target in zip(rows, state.targets, strict=True):
            out = x[target]
            if target.start not in fresh:
                fresh.add(target.start)
                out.zero_()
            nbytes = codec.payload_nbytes(out.numel())
            codec.decode_add(row[:nbytes], out, state.seed + state.compressions - 1)
        if x is not state.x:
            state.x.copy_(x)

    def _communicate_dense(self, task: Task, state: _State, group: ProcessGroup, root: int) -> _Started:
        x = state.x
        wire = x if x.dtype == self._wire_dtype else x.to(self._wire_dtype)
        shards = self._shards(wire)
        mine = shards[self.rank]

        def take(part: slice, source: Tensor) -> Callable[[], object]:
            return _nothing if source.data_ptr() == x[part].data_ptr() else lambda: x[part].copy_(source)

        whole = slice(0, x.numel())
        if task is Task.ALLREDUCE:
            return routines.allreduce(wire, group), take(whole, wire)
        if task is Task.REDUCE_SCATTER:
            state.shard = mine
            out = torch.empty_like(wire[mine])
            return routines.reduce_scatter(out, wire, group), take(mine, out)
        if task is Task.ALLGATHER:
            state.shard = None
            return routines.allgather(wire, wire[mine].clone(), group), take(whole, wire)
        if task is Task.REDUCE:
            state.present = self.rank == root
            return routines.reduce(wire, root, group), take(whole, wire)
        assert task is Task.BROADCAST
        state.present = True
        return routines.broadcast(wire, root, group), take(whole, wire)

    def _communicate_rows(self, task: Task, state: _State, group: ProcessGroup, root: int) -> _Started:
        rows = state.rows
        assert rows is not None
        count, stride = rows.shape
        shards = self._shards(state.x)
        if task is Task.ALLREDUCE:
            codec = state.compressor.codec
            assert codec.sum_dtype is not None
            nbytes = codec.payload_nbytes(state.x.numel())
            return routines.allreduce(rows[0, :nbytes].view(codec.sum_dtype), group), _nothing
        if task is Task.ALLGATHER:
            state.rows = rows.new_empty(self.world * count, stride)
            senders = [rank for rank in range(self.world) for _ in range(count)]
            state.targets = [shards[rank] if state.shard else state.targets[0] for rank in senders]
            state.shard = None
            return routines.allgather(state.rows.view(-1), rows.view(-1), group), _nothing
        if task is Task.ALLTOALL:
            state.rows = torch.empty_like(rows)
            state.shard = shards[self.rank]
            state.targets = [state.shard] * self.world
            return routines.alltoall(state.rows.view(-1), rows.view(-1), group), _nothing
        if task is Task.GATHER:
            state.present = self.rank == root
            state.rows = rows.new_empty(self.world, stride)
            state.targets = state.targets * self.world
            return routines.gather(state.rows.view(-1) if state.present else None, rows.view(-1), root, group), _nothing
        assert task is Task.BROADCAST
        state.present = True
        return routines.broadcast(rows.view(-1), root, group), _nothing

    def _shards(self, x: Tensor) -> list[slice]:
        length = x.numel() // self.world
        return [slice(rank * length, (rank + 1) * length) for rank in range(self.world)]

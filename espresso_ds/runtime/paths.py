"""The way of one unit through one rank: an option, a size and a rank turned into concrete steps, once, before training (E 4.2).

Pure bookkeeping: what this rank is in charge of, which rows of payload it holds, what each row decodes into, which part of whose
buffer every routine moves. All ranks follow all actions, also those in which they take no part, so that their books agree when
a root hands its result back. `planner.cost.operations` follows the same rules to price the same steps.

A unit of n elements is cut evenly into as many parts as the option's divisible schemes ask for; the last ones may reach past n.
What is compressed ends at n. Only an uncompressed reduce-scatter or allgather needs equal parts, and thus a padded buffer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import prod
from typing import NamedTuple

from ..core.option import Action, Device, Level, Option, Task


class Place(NamedTuple):
    """A rank of a cluster of `nodes` hosts: rank = node * ranks_per_node + local.

    `members` are the cluster's ranks by their numbers in the job, in order; none: the job is the cluster.
    """

    nodes: int
    ranks_per_node: int
    rank: int
    members: tuple[int, ...] = ()

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.nodes * self.ranks_per_node

    def size(self, level: Level) -> int:
        """Ranks of a group of the level: all, those of a node, or one of every node."""
        return {Level.FLAT: self.world, Level.INTRA: self.ranks_per_node, Level.INTER: self.nodes}[level]

    def position(self, level: Level) -> int:
        """Rank within the group of the level."""
        node, local = divmod(self.rank, self.ranks_per_node)
        return {Level.FLAT: self.rank, Level.INTRA: local, Level.INTER: node}[level]

    def groups(self, level: Level) -> list[list[int]]:
        """The ranks of every group of the level, by their numbers in the job, in the order of their positions."""
        ranks, width = self.members or range(self.world), self.ranks_per_node
        if level is Level.FLAT:
            return [list(ranks)]
        if level is Level.INTRA:
            return [list(ranks[node * width : (node + 1) * width]) for node in range(self.nodes)]
        return [list(ranks[local::width]) for local in range(width)]


class Span(NamedTuple):
    """Elements `start` to `stop` - 1 of the unit's buffer."""

    start: int
    stop: int

    @property
    def numel(self) -> int:
        """How many."""
        return self.stop - self.start

    def part(self, place: int, count: int) -> Span:
        """One of `count` equal parts."""
        length = self.numel // count
        return Span(self.start + place * length, self.start + (place + 1) * length)

    def until(self, end: int) -> Span:
        """What of it lies below `end`; possibly nothing."""
        return Span(min(self.start, end), min(self.stop, end))


class Sum(NamedTuple):
    """The rows from `first` to `end` - 1 are decoded and added up into `target`."""

    target: Span
    first: int
    end: int


@dataclass(frozen=True, slots=True)
class Encode:
    """Compress: row i of row buffer 0 becomes the payload of `targets[i]`, which may be empty.

    `stream` is equal on ranks that compress the same values and must do it alike: once a scheme between nodes is complete, ranks
    with the same place on their nodes. Others, at least those whose payloads meet, differ in it.
    """

    number: int  # of the action
    compression: int  # counts the compressions of the option
    device: Device
    stream: int
    targets: tuple[Span, ...]

    @property
    def extent(self) -> Span:
        """All that is compressed."""
        return Span(self.targets[0].start, self.targets[-1].stop)


@dataclass(frozen=True, slots=True)
class Decode:
    """Decompress the rows of a buffer."""

    number: int
    compression: int
    device: Device
    buffer: int
    rows: int
    sums: tuple[Sum, ...]

    @property
    def extent(self) -> Span:
        """All that is decompressed; maybe nothing."""
        return Span(self.sums[0].target.start, self.sums[-1].target.stop) if self.sums else Span(0, 0)


@dataclass(frozen=True, slots=True)
class MoveRows:
    """A routine on rows of payload: from one of the unit's two row buffers into the other, or in place.

    `arrange` lists the rows in the order in which the routine needs them: if given, they first move to the other buffer.
    """

    number: int
    lane: int
    task: Task
    level: Level
    root: int  # rank within the group
    takes_part: bool
    compression: int
    payload: Span  # what an allreduce's one payload stands for
    rows: int
    arrange: tuple[int, ...] | None
    buffer: int  # holds the rows when the routine starts
    rows_after: int
    buffer_after: int


@dataclass(frozen=True, slots=True)
class MoveValues:
    """A routine on uncompressed elements: all of `whole`, of which `mine` is this rank's part before or after."""

    number: int
    lane: int
    task: Task
    level: Level
    root: int
    takes_part: bool
    whole: Span
    mine: Span


Step = Encode | Decode | MoveRows | MoveValues


@dataclass(frozen=True)
class Path:
    """All that one rank does for a unit.

    Attributes:
        buffer_numel: elements that the unit's buffer needs: n, or more where equal parts are needed.
        steps: in order; codec steps of other ranks are left out, routines of others are marked.
        row_numels: for each compression, of how many elements rows are payloads, on any rank: what row sizes follow from.
    """

    buffer_numel: int
    steps: tuple[Step, ...]
    row_numels: tuple[tuple[int, ...], ...]

    def rows_needed(self) -> Iterator[tuple[int, int, int]]:
        """(buffer, rows, compression) of everything that the row buffers ever hold."""
        for step in self.steps:
            if isinstance(step, Encode):
                yield 0, len(step.targets), step.compression
            elif isinstance(step, MoveRows) and step.takes_part:
                yield step.buffer, step.rows, step.compression
                yield step.buffer_after, step.rows_after, step.compression


def path(option: Option, numel: int, index: int, place: Place) -> Path:
    """Follow `option` for a unit of `numel` elements on one rank.

    Args:
        option: checked, flat or hierarchical.
        numel: of the unit, at least 1.
        index: of the unit; roots rotate with it.
        place: the rank.
    """
    divisions = [
        place.size(action.at)
        for action in option.actions
        if isinstance(action.at, Level) and action.task in (Task.REDUCE_SCATTER, Task.ALLTOALL)
    ]
    walker = _Walker(option.actions, numel, index, place, Span(0, -(-numel // prod(divisions)) * prod(divisions)))
    for number, action in enumerate(option.actions):
        if isinstance(action.at, Level):
            walker.move(number, action.task, action.at)
        elif action.task is Task.COMPRESS:
            walker.compress(number, action.at)
        else:
            walker.decompress(number, action.at)
    assert walker.in_charge and not walker.cuts, option
    spans = (s.whole for s in walker.steps if isinstance(s, MoveValues) and s.task in (Task.REDUCE_SCATTER, Task.ALLGATHER))
    return Path(max([numel, *(span.stop for span in spans)]), tuple(walker.steps), tuple(walker.row_numels))


@dataclass
class _Walker:
    """The books of one rank. Spans are uncropped here: equal parts of equal parts."""

    actions: tuple[Action, ...]
    numel: int
    index: int
    place: Place
    span: Span  # what this rank is in charge of
    cuts: list[tuple[Level, Span]] = field(default_factory=list)  # what divisible schemes under way will bring back
    away: set[Level] = field(default_factory=set)  # groups whose root, another rank, goes on alone
    targets: tuple[Span, ...] = ()  # of the rows, where the unit is packed
    buffer: int = 0
    lane: int = 0
    replicated: bool = False  # every node has the same
    steps: list[Step] = field(default_factory=list)
    row_numels: list[tuple[int, ...]] = field(default_factory=list)

    @property
    def in_charge(self) -> bool:
        return not self.away

    def compress(self, number: int, device: Device) -> None:
        """Cut into the rows that the alltoalls before the next decompression hand out."""
        spans = [self.span]
        for count in _handed_out(self.actions[number + 1 :], self.place):
            spans = [span.part(place, count) for span in spans for place in range(count)]
        self.targets, self.buffer = tuple(spans), 0
        length = spans[0].numel
        self.row_numels.append(tuple(sorted({min(length, self.numel), self.numel % length} - {0})))
        if self.in_charge:
            targets = tuple(span.until(self.numel) for span in spans)
            stream = self.place.position(Level.INTRA) if self.replicated else self.place.rank
            self.steps.append(Encode(number, len(self.row_numels) - 1, device, stream, targets))

    def decompress(self, number: int, device: Device) -> None:
        """Add up what stands for the same elements; such rows always lie together, in the order of the ranks they are from."""
        sums, first = [], 0
        for target, rows in groupby(self.targets):
            count = len(list(rows))
            if target.start < self.numel:
                sums.append(Sum(target.until(self.numel), first, first + count))
            first += count
        if self.in_charge:
            self.steps.append(Decode(number, len(self.row_numels) - 1, device, self.buffer, len(self.targets), tuple(sums)))
        self.targets = ()

    def move(self, number: int, task: Task, level: Level) -> None:
        """Note a routine and what it leaves."""
        size, mine = self.place.size(level), self.place.position(level)
        root = self.index % size
        takes_part = not self.away - {level}
        packed, whole = self.targets, self.span
        arrange: tuple[int, ...] | None = None
        if task in (Task.REDUCE_SCATTER, Task.ALLTOALL):
            self.cuts.append((level, self.span))
            self.span = part = self.span.part(mine, size)
            if packed:
                order = sorted(range(len(packed)), key=packed.__getitem__)  # stable: by target, then by sender
                arrange = tuple(order) if order != list(range(len(packed))) else None
                self.targets = tuple(packed[row] for row in order if part.start <= packed[row].start < part.stop) * size
        elif task is Task.ALLGATHER and self.cuts and self.cuts[-1][0] is level:
            own, (_, self.span) = self.span, self.cuts.pop()
            whole = self.span
            shifts = [(peer - mine) * own.numel for peer in range(size)]
            self.targets = tuple(Span(row.start + shift, row.stop + shift) for shift in shifts for row in packed)
        elif task in (Task.ALLGATHER, Task.GATHER):
            self.targets = packed * size
        if task in (Task.REDUCE, Task.GATHER) and mine != root:
            self.away.add(level)
        elif task is Task.BROADCAST:
            self.away.discard(level)
        if level is Level.INTER and task not in (Task.REDUCE_SCATTER, Task.ALLTOALL, Task.REDUCE, Task.GATHER):
            self.replicated = True
        if packed:
            self._move_rows(number, task, level, root, takes_part, packed, arrange)
        else:
            divides = task in (Task.REDUCE_SCATTER, Task.ALLGATHER)
            whole = whole if divides else whole.until(self.numel)
            own_part = whole.part(mine, size) if divides else whole
            self.steps.append(MoveValues(number, self.lane, task, level, root, takes_part, whole, own_part))
        self.lane += 1

    def _move_rows(
        self,
        number: int,
        task: Task,
        level: Level,
        root: int,
        takes_part: bool,
        packed: Sequence[Span],
        arrange: tuple[int, ...] | None,
    ) -> None:
        start = self.buffer if arrange is None else 1 - self.buffer
        end = start if task in (Task.ALLREDUCE, Task.BROADCAST) else 1 - start
        payload = packed[0].until(self.numel)
        rows_after = len(self.targets)
        if task is Task.GATHER and self.place.position(level) != root:
            rows_after = 0  # in memory; the books have them all
        self.steps.append(
            MoveRows(
                number,
                self.lane,
                task,
                level,
                root,
                takes_part,
                len(self.row_numels) - 1,
                payload,
                len(packed),
                arrange,
                start,
                rows_after,
                end,
            )
        )
        self.buffer = end


def _handed_out(following: Iterable[Action], place: Place) -> Iterator[int]:
    """Group sizes of the alltoalls before the next decompression."""
    for action in following:
        if action.task is Task.DECOMPRESS:
            return
        if action.task is Task.ALLTOALL and isinstance(action.at, Level):
            yield place.size(action.at)

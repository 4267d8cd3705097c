"""Compression options: what happens to one tensor between "gradient ready" and "gradient averaged" (E 4.2, tables 2 and 3).

An option is a short list of actions with a text form, for example ``C.gpu A2A.flat D.gpu C.gpu AG.flat D.gpu``. The same
text stands in plans, logs, profiler ranges and tests; `parse` and `str` are inverse.

Tasks on a device: ``C`` compress, ``D`` decompress; ``gpu`` is the device that holds the tensor, ``cpu`` the host.
Where training itself runs on the CPU, the two are one device, called ``cpu``.
Tasks on a level of the network (``flat``, ``intra``, ``inter``) are routines:

| text | routine        | step        | carries            |
|------|----------------|-------------|--------------------|
| AR   | allreduce      | indivisible | tensor; payloads that may be summed |
| AG   | allgather      | indivisible for payloads, second step after RS or A2A | both |
| RS   | reduce-scatter | first       | tensor             |
| RD   | reduce         | first       | tensor             |
| A2A  | alltoall       | first       | payloads           |
| GA   | gather         | first       | payloads           |
| BC   | broadcast      | second step after RD or GA | both |

PowerSGD is a path of its own, ``P.gpu AR.flat Q.gpu AR.flat D.gpu``: a matrix M goes out as the factors P = M Q and Q = M^T P,
each summed by an allreduce, on one device throughout. It is not in the paper's tree.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property, lru_cache
from itertools import takewhile
from typing import NamedTuple, Self

from .errors import FileError, nearest


class Task(StrEnum):
    """What an action does."""

    COMPRESS = "C"
    DECOMPRESS = "D"
    LEFT = "P"
    RIGHT = "Q"
    ALLREDUCE = "AR"
    ALLGATHER = "AG"
    REDUCE_SCATTER = "RS"
    REDUCE = "RD"
    BROADCAST = "BC"
    ALLTOALL = "A2A"
    GATHER = "GA"


class Device(StrEnum):
    """Where a tensor is compressed or decompressed."""

    GPU = "gpu"
    CPU = "cpu"


class Level(StrEnum):
    """Which ranks a routine joins: all, those of one node, or one of every node."""

    FLAT = "flat"
    INTRA = "intra"
    INTER = "inter"


CODEC_TASKS = frozenset({Task.COMPRESS, Task.DECOMPRESS, Task.LEFT, Task.RIGHT})
ROUTINES = frozenset(Task) - CODEC_TASKS
SECOND_STEP = {
    Task.REDUCE_SCATTER: Task.ALLGATHER,
    Task.ALLTOALL: Task.ALLGATHER,
    Task.REDUCE: Task.BROADCAST,
    Task.GATHER: Task.BROADCAST,
}


@dataclass(frozen=True, slots=True)
class Action:
    """One task and where it happens: a device for C and D, a level for routines."""

    task: Task
    at: Device | Level

    def __str__(self) -> str:
        return f"{self.task}.{self.at}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Inverse of `str`. Raises FileError that names the text and the nearest known words."""
        task, dot, at = text.partition(".")
        if not dot or task not in set(Task):
            raise FileError(f"unknown action {text!r}{nearest(task, Task)}")
        places: type[Device] | type[Level] = Device if Task(task) in CODEC_TASKS else Level
        if at not in set(places):
            raise FileError(f"unknown place in action {text!r}{nearest(at, places)}")
        return cls(Task(task), places(at))


@dataclass(frozen=True)
class Option:
    """The actions of one tensor, first to last."""

    actions: tuple[Action, ...]

    def __str__(self) -> str:
        return " ".join(map(str, self.actions))

    @classmethod
    def parse(cls, text: str) -> Option:
        """Inverse of `str`; the result is checked.

        Raises:
            FileError: an unknown action, or actions in an order that cannot average a tensor.
        """
        return _parse(text)  # type and result are immutable, so parsed texts are shared

    @cached_property
    def compresses(self) -> bool:
        """Whether any action compresses."""
        return self.compressions > 0

    @cached_property
    def low_rank(self) -> bool:
        """Whether the tensor goes out as the factors of PowerSGD, which no codec makes."""
        return any(action.task is Task.LEFT for action in self.actions)

    @cached_property
    def sums_payloads(self) -> bool:
        """Whether an allreduce adds up payloads, which few codecs allow."""
        return any(
            before.task is Task.COMPRESS and after.task is Task.ALLREDUCE
            for before, after in zip(self.actions, self.actions[1:], strict=False)
        )

    @cached_property
    def compressions(self) -> int:
        """How often the tensor is compressed on its way; the two factors of PowerSGD are one compression."""
        return sum(action.task in (Task.COMPRESS, Task.LEFT) for action in self.actions)

    @cached_property
    def compresses_gradients_only(self) -> bool:
        """Whether what is compressed is a rank's own gradient, never a sum on its way."""
        return self.compressions == 0 or (self.compressions == 1 and self.actions[0].task is Task.COMPRESS)

    @cached_property
    def decodes_all_ranks_at_once(self) -> bool:
        """Whether the first decompression has the payloads of all ranks before it, none of them summed up."""
        before = tuple(takewhile(lambda action: action.task is not Task.DECOMPRESS, self.actions))
        met = {action.at for action in before}
        unsummed = all(action.task not in (Task.ALLREDUCE, Task.REDUCE, Task.REDUCE_SCATTER) for action in before)
        return unsummed and (Level.FLAT in met or {Level.INTRA, Level.INTER} <= met)

    def unfit_for(self, *, summable: bool, votes: bool, keeps_scale: bool) -> str | None:
        """Why a codec cannot be right on this way, or None if it can.

        Args:
            summable: its payloads may be added up.
            votes: it needs the payloads of all ranks at once.
            keeps_scale: what it decodes is as large as what it encoded, at least in the mean.
        """
        if not self.compresses or self.low_rank:
            return None
        if self.sums_payloads and not summable:
            return "it sums payloads"
        if votes and not self.decodes_all_ranks_at_once:
            return "it decodes the payloads of some ranks apart from those of the others"
        if not keeps_scale and not self.compresses_gradients_only:
            return "it compresses sums of several ranks, whose size would be lost"
        return None

    @cached_property
    def levels(self) -> frozenset[Level]:
        """The levels whose groups the option needs."""
        return frozenset(action.at for action in self.actions if isinstance(action.at, Level))

    def check(self) -> None:
        """Follow the tensor through the actions; raise FileError at the first that cannot be done, or if it ends too early."""
        state = START
        for number, action in enumerate(self.actions):
            following = dict(moves(state, summable=True, low_rank=True))
            step = action.task, (None if action.task in CODEC_TASKS else action.at)
            if step not in following:
                expected = ", ".join(f"{task}.{at}" if at else task for task, at in following) or "nothing more"
                raise FileError(f"option {str(self)!r}: action {number + 1} ({action}) cannot come here; possible: {expected}")
            state = following[step]
        if not state.ends:
            end = "compressed" if state.packed else "before the tensor is complete"
            raise FileError(f"option {str(self)!r}: ends {end}")
        devices = {action.at for action in self.actions if isinstance(action.at, Device)}
        if self.low_rank and len(devices) > 1:
            raise FileError(f"option {str(self)!r}: P, Q and D work on one copy of the tensor; give them one device")


class State(NamedTuple):
    """A tensor on its way through the option tree (E 4.2, figure 8): which routine is due, and in what form the tensor is."""

    level: Level | None = None  # of the next routine; None: before the first
    second: Task | None = None  # completes the divisible scheme under way at `level`; None: a new scheme starts there
    outer: Task | None = None  # completes the scheme inside the node, once the one between nodes is complete
    packed: bool = False
    fresh: bool = False  # just compressed: a routine must follow
    done: bool = False  # no routine is left
    low_rank: int = 0  # steps taken along LOW_RANK; 0: the tensor takes another path

    @property
    def ends(self) -> bool:
        """Whether the tensor is complete and not compressed."""
        return self.done and not self.packed


START = State()
LOW_RANK = (
    (Task.LEFT, None),
    (Task.ALLREDUCE, Level.FLAT),
    (Task.RIGHT, None),
    (Task.ALLREDUCE, Level.FLAT),
    (Task.DECOMPRESS, None),
)
"""The path of PowerSGD: tasks with their levels (None: a device)."""


def moves(state: State, summable: bool = False, low_rank: bool = False) -> Iterator[tuple[tuple[Task, Level | None], State]]:
    """The edges of the option tree: each task that may come next, with its level (None: any device), and where it leads.

    Flat schemes take one phase; hierarchical ones are a divisible scheme inside the node around any scheme between nodes.

    Args:
        state: where the tensor is.
        summable: payloads may be added up, so that an allreduce carries them too. Not in the paper, whose indivisible routine
            for compressed tensors is allgather; its traffic grows with the number of ranks.
        low_rank: PowerSGD's path may be taken, which is not in the paper either.
    """
    if state.low_rank or (low_rank and state == START):
        taken = state.low_rank + 1
        if taken <= len(LOW_RANK):
            yield LOW_RANK[taken - 1], State(packed=taken < len(LOW_RANK), done=True, low_rank=taken)
    if not state.done:
        for level in (Level.FLAT, Level.INTRA) if state.level is None else (state.level,):
            for task in _schemes(state, level, summable):
                yield (task, level), _after(state, task, level)
        if not state.packed:
            yield (Task.COMPRESS, None), state._replace(packed=True, fresh=True)
    if state.packed and not state.fresh and not state.low_rank:
        yield (Task.DECOMPRESS, None), state._replace(packed=False)


def _schemes(state: State, level: Level, summable: bool) -> tuple[Task, ...]:
    """The routines of tables 2 and 3 that are possible at a level."""
    if state.second is not None:
        return (state.second,)
    firsts = (Task.ALLTOALL, Task.GATHER) if state.packed else (Task.REDUCE_SCATTER, Task.REDUCE)
    if level is Level.INTRA:
        return firsts
    if not state.packed:
        return (Task.ALLREDUCE, *firsts)
    return (Task.ALLGATHER, *firsts, *((Task.ALLREDUCE,) if summable and state.fresh else ()))


def _after(state: State, task: Task, level: Level) -> State:
    """The state after a routine."""
    moved = state._replace(level=level, fresh=False)
    if state.second is None and task in SECOND_STEP:
        if level is Level.INTRA:
            return moved._replace(level=Level.INTER, outer=SECOND_STEP[task])
        return moved._replace(second=SECOND_STEP[task])
    if level is Level.INTER:
        return moved._replace(level=Level.INTRA, second=state.outer, outer=None)
    return moved._replace(second=None, done=True)


@lru_cache(maxsize=8192)
def _parse(text: str) -> Option:
    option = Option(tuple(Action.parse(word) for word in text.split()))
    option.check()
    return option


UNCOMPRESSED = Option.parse("AR.flat")

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
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property, lru_cache
from typing import Self

from .errors import FileError, nearest


class Task(StrEnum):
    """What an action does."""

    COMPRESS = "C"
    DECOMPRESS = "D"
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


CODEC_TASKS = frozenset({Task.COMPRESS, Task.DECOMPRESS})
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
        return any(action.task is Task.COMPRESS for action in self.actions)

    @cached_property
    def sums_payloads(self) -> bool:
        """Whether an allreduce adds up payloads, which few codecs allow."""
        return any(
            before.task is Task.COMPRESS and after.task is Task.ALLREDUCE
            for before, after in zip(self.actions, self.actions[1:], strict=False)
        )

    @cached_property
    def levels(self) -> frozenset[Level]:
        """The levels whose groups the option needs."""
        return frozenset(action.at for action in self.actions if isinstance(action.at, Level))

    def check(self) -> None:
        """Follow the tensor through the actions; raise FileError at the first that cannot be done or is missing.

        Flat options are followed to the end. Options with intra and inter steps are built by the option tree only.
        """
        if self.levels != {Level.FLAT}:
            raise FileError(f"option {str(self)!r}: only flat routines can be executed by this version")
        packed, first, done = False, None, False
        for number, action in enumerate(self.actions):
            task = action.task
            if task is Task.COMPRESS:
                fault = "compresses what is compressed" if packed else "compresses after the last routine" if done else ""
                packed = True
            elif task is Task.DECOMPRESS:
                fault = "" if packed else "decompresses what is not compressed"
                packed = False
            elif done:
                fault = f"{task} comes after the tensor is complete"
            elif first is not None:
                fault = "" if task is SECOND_STEP[first] else f"{first} needs {SECOND_STEP[first]} as its second step"
                done = True
            elif task in SECOND_STEP:
                wants_packed = task in (Task.ALLTOALL, Task.GATHER)
                fault = "" if packed is wants_packed else f"{task} carries {'payloads' if wants_packed else 'tensors'}"
                first = task
            else:
                fault = ""
                if task is Task.BROADCAST or (task is Task.ALLGATHER and not packed):
                    fault = f"{task} needs a first step"
                done = True
            if fault:
                raise FileError(f"option {str(self)!r}: action {number + 1} ({action}) {fault}")
        if not done or packed:
            raise FileError(f"option {str(self)!r}: ends {'compressed' if packed else 'before the tensor is complete'}")


@lru_cache(maxsize=8192)
def _parse(text: str) -> Option:
    option = Option(tuple(Action.parse(word) for word in text.split()))
    option.check()
    return option


UNCOMPRESSED = Option.parse("AR.flat")

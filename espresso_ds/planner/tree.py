"""The option tree: every way to synchronise one tensor (E 4.2, figure 8).

With d devices for each compression and decompression, the flat paths from "gradient ready" to "gradient averaged" are

    AR                                                      1
    RS AG | RD BC                                           2
    RS C AG D | RD C BC D                                   2 d^2
    C AG D                                                  d^2
    C A2A AG D | C GA BC D                                  2 d^2
    C A2A D AG | C GA D BC                                  2 d^2
    C A2A D C AG D | C GA D C BC D                          2 d^4

which is 12 for d = 1 and 63 for d = 2. Hierarchical paths nest such a scheme between nodes into a divisible one inside the node:
162 and 4278. Both come from the edges in `core.option.moves`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache

from ..core.config import Constraints
from ..core.errors import FileError, nearest
from ..core.option import START, Action, Device, Level, Option, State, Task, moves


@lru_cache(maxsize=64)
def option_tree(devices: tuple[Device, ...], summable: bool = False, low_rank: bool = False) -> tuple[Option, ...]:
    """All options, shortest first: 174 with one device, 4341 with two (E's |C_gpu| and |C|). Uncompressed allreduce comes first.

    Args:
        devices: where compressions and decompressions may run.
        summable: with the options that sum payloads in an allreduce, which are not in the paper's tree.
        low_rank: with the path of PowerSGD on each device, which is not in the paper's tree either.
    """
    found: list[tuple[Action, ...]] = []

    def grow(path: tuple[Action, ...], state: State) -> None:
        if state.ends:
            found.append(path)
        for (task, level), after in moves(state, summable, low_rank):
            own = (path[0].at,) if state.low_rank else devices  # PowerSGD's tasks work on one copy of the tensor
            for place in own if level is None else (level,):
                grow((*path, Action(task, place)), after)

    grow((), START)
    return tuple(sorted(map(Option, found), key=lambda option: len(option.actions)))


def allowed(options: Iterable[Option], constraints: Constraints, nodes: int, ranks_per_node: int) -> tuple[Option, ...]:
    """The options that a cluster of this shape has and that the user's constraints leave.

    Hierarchical options need several nodes of several ranks.

    Raises:
        FileError: a constraint names what does not exist, or leaves no option.
    """
    flat_only = constraints.flat_only or nodes == 1 or ranks_per_node == 1
    check_forbidden(constraints)
    banned = set(constraints.forbid)
    most = constraints.max_compressions
    left = tuple(
        option
        for option in options
        if (not flat_only or option.levels == {Level.FLAT})
        and (most is None or option.compressions <= most)
        and not any({str(action), str(action.task), str(action.at)} & banned for action in option.actions)
    )
    if not any(not option.compresses for option in left):
        raise FileError(
            f"constraints: forbid {list(constraints.forbid)} leaves no way to send a tensor uncompressed; remove one of them"
        )
    return left


def check_forbidden(constraints: Constraints) -> None:
    """Raise FileError where `forbid` names what does not exist."""
    words = {str(word) for word in (*Task, *Device, *Level)}
    for word in constraints.forbid:
        try:
            known = str(Action.parse(word)) == word if "." in word else word in words
        except FileError:
            known = False
        if not known:
            raise FileError(f"constraints: forbid has {word!r}, which is no action, task or place{nearest(word, words)}")


def is_exact(name: str, patterns: Sequence[str]) -> bool:
    """Whether a tensor's name matches one of the patterns of tensors that are never compressed."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)

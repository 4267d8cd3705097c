"""Data whose sums, rows and order can be checked: what each rank puts into a routine, and what must come out.

Element i of rank r is ((i + 97 r) mod 251) mod 4. 251 is prime, so a shift by a row, by a block or by a rank shows; sums of up
to 85 ranks stay below 256, where every dtype is exact. Of more ranks, only every second, third, ... holds an element, in turn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bench_report import P2P

_PRIME, _SHIFT, _VALUES = 251, 97, 4
_ADDENDS = 85
_UNTOUCHED = 101
"""What outputs hold before: exact in every dtype, and no result unless many ranks add up."""

ROWS: dict[str, tuple[bool, bool]] = {
    "allreduce": (True, False),
    "reduce": (True, False),
    "broadcast": (True, False),
    "reduce_scatter": (True, False),
    "alltoall": (True, True),
    "allgather": (False, True),
    "gather": (False, True),
    P2P: (True, True),
}
"""Of every routine: whether what is given, and what is taken, is as long as the routine's size S, or else S / n."""


def numels(routine: str, nbytes: int, size: int, itemsize: int) -> tuple[int, int]:
    """Elements that a rank gives and takes for a routine's size in bytes, a multiple of `size` ranks times `itemsize`."""
    whole = nbytes // itemsize
    gives, takes = ROWS[routine]
    return (whole if gives else whole // size), (whole if takes else whole // size)


def rounded(nbytes: int, size: int, itemsize: int) -> int:
    """`nbytes` rounded up to whole elements in `size` equal rows."""
    row = size * itemsize
    return -(-nbytes // row) * row


def prepare(routine: str, given: Tensor, taken: Tensor, member: int, size: int) -> None:
    """Fill what rank `member` of `size` gives, and mark what it takes as untouched."""
    start = 0 if ROWS[routine][0] else member * len(given)
    given.copy_(_tiled(_table(member, size, start), given))
    taken.fill_(_UNTOUCHED)


def count_wrong(routine: str, given: Tensor, taken: Tensor, member: int, size: int, root: int) -> int:
    """How many elements of the routine's result on rank `member` are not what they must be; 0 where it has no result."""
    if routine in ("reduce", "gather") and member != root:
        return 0
    result = given if routine in ("allreduce", "reduce", "broadcast") else taken
    return int((result != _expected(routine, result, member, size, root)).sum().item())


def _expected(routine: str, like: Tensor, member: int, size: int, root: int) -> Tensor:
    row = len(like) // size
    match routine:
        case "allreduce" | "reduce":
            return _tiled(_sum(size, 0), like)
        case "reduce_scatter":
            return _tiled(_sum(size, member * len(like)), like)
        case "broadcast":
            return _tiled(_table(root, size, 0), like)
        case "alltoall":
            return torch.cat([_tiled(_table(other, size, member * row), like[:row]) for other in range(size)])
        case "allgather" | "gather":
            return torch.cat([_tiled(_table(other, size, other * row), like[:row]) for other in range(size)])
        case _:  # p2p, between two
            return _tiled(_table(1 - member, size, 0), like)


def _table(member: int, size: int, start: int) -> Tensor:
    """One period of the elements of `member` from `start` on, int64."""
    turns = -(-size // _ADDENDS)
    index = torch.arange(_PRIME * turns) + start
    held = (index + member) % turns == 0
    return ((index + _SHIFT * member) % _PRIME % _VALUES) * held


def _sum(size: int, start: int) -> Tensor:
    return torch.stack([_table(member, size, start) for member in range(size)]).sum(0)


def _tiled(table: Tensor, like: Tensor) -> Tensor:
    """The table again and again, as long as `like` and of its dtype and device."""
    return table.to(like.device, like.dtype).repeat(-(-len(like) // len(table)))[: len(like)]

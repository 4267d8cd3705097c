"""`espresso bench net` on every rank: routines and links, checked and timed, as ds_bench and nccl-tests do.

    mpirun -n 2 python -m espresso_ds.profiler.bench_net '{"routines": ["allreduce"], "sizes": [1024]}'

Rank 0 prints lines `@progress SHARE WHAT` and at last the report as lines `@result ...` (see `bench_report`): it need not share
a file system with whoever started it. Faults go to stderr, and the exit status is then 1.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

import psutil
import torch
from torch import Tensor

from .. import __version__
from ..core.errors import EspressoError, SyncError, UnsupportedError
from ..core.people import people_bytes
from ..core.progress import print_progress
from .bench_check import count_wrong, numels, prepare, rounded
from .bench_report import DTYPES, FAULT, P2P, NetReport, NetRow, NetSettings, write_report
from .bench_transport import Team, World, world
from .machine import machine_facts

_ROW_S, _LONGEST_ROW = 0.02, 50
"""Seconds of one trial of short messages, and most calls: shapers and buffers give the first ones a credit."""
_BUFFERS = 4
"""What is given and taken, and while results are checked, what is expected and how it compares."""
_STRAGGLES, _MOST_TRIALS = 1.05, 0.75

Progress = Callable[[float, str], None]


@dataclass
class _Cell:
    """One routine of one team at one size, on this rank."""

    team: Team
    routine: str
    nbytes: int
    given: Tensor
    taken: Tensor
    in_a_row: int = 1
    wrong: int = 0
    seconds: list[float] = field(default_factory=list)

    @property
    def text(self) -> str:
        return f"{self.routine} {people_bytes(self.nbytes)}, {self.team.name}"

    def check(self) -> int:
        """Run once on known data; the number of this rank's wrong elements."""
        if not self.team.joins:
            return 0
        root = self.team.size - 1
        prepare(self.routine, self.given, self.taken, self.team.member, self.team.size)
        self.team.calls[self.routine](self.given, self.taken, root)
        return count_wrong(self.routine, self.given, self.taken, self.team.member, self.team.size, root)

    def time(self, ranks: World, count: int) -> float:
        """Mean seconds of one call among `count`. Roots rotate: one could run ahead of the others, and hide its latency."""
        ranks.align()
        begin = time.perf_counter()
        for number in range(count if self.team.joins else 0):
            self.team.calls[self.routine](self.given, self.taken, number % self.team.size)
        ranks.settle()
        seconds = (time.perf_counter() - begin) / count
        messages = 2 if self.routine == P2P else 1
        return seconds / messages if self.team.joins else 0.0


def bench(ranks: World, settings: NetSettings, progress: Progress) -> NetReport:
    """Check, then time every routine at every size between every team; called by all ranks together, which get the same report.

    A first run of each size is checked, a second decides how often it runs in a row. Then every trial goes through all sizes,
    and at each size through all routines, so that a disturbance, or a drift of the link, hits them alike.

    Raises:
        UnsupportedError: the buffers don't fit into memory; alike on all ranks.
        SyncError: an operation failed or ran past its deadline; other ranks then fail too.
    """
    try:
        cells, left_out = _first_runs(ranks, settings, progress)
        _trials(ranks, settings, cells, progress)
        rows = _rows(ranks, cells, settings.trials)
    except RuntimeError as error:  # torch's one kind for everything that may go wrong between ranks
        raise SyncError(f"measuring failed: {error}") from error
    return NetReport(
        espresso=__version__,
        backend=ranks.backend,
        library=ranks.library,
        hosts=ranks.hosts,
        ranks_per_node=ranks.ranks_per_node,
        dtype=settings.dtype,
        trials=settings.trials,
        machine=machine_facts(),
        rows=tuple(rows),
        left_out=tuple(left_out),
    ).with_link_shares()


def _first_runs(ranks: World, settings: NetSettings, progress: Progress) -> tuple[list[_Cell], list[str]]:
    """The cells that fit into `longest_s`, checked and warmed up; and what was left out."""
    itemsize = DTYPES[settings.dtype]
    names = dict.fromkeys((*settings.routines, P2P))  # the links are what routines are compared with
    lines = [(team, name) for team in ranks.teams for name in names if name in team.calls]
    largest = max(rounded(settings.sizes[-1], team.size, itemsize) for team, _ in lines)
    given, taken = _buffers(ranks, largest, getattr(torch, settings.dtype))
    cells: list[_Cell] = []
    left_out = []
    for number, (team, routine) in enumerate(lines):
        sizes = sorted({rounded(nbytes, team.size, itemsize) for nbytes in settings.sizes})
        for index, nbytes in enumerate(sizes):
            gives, takes = numels(routine, nbytes, team.size, itemsize)
            cell = _Cell(team, routine, nbytes, given[:gives], taken[:takes])
            progress(0.3 * (number + index / len(sizes)) / len(lines), f"checking {cell.text}")
            wrong = cell.check()
            told = ranks.gather([cell.time(ranks, 1), float(wrong)])
            slowest = max(seconds for seconds, _ in told)
            cell.wrong = round(sum(each for _, each in told))
            cell.in_a_row = max(1, min(_LONGEST_ROW, int(_ROW_S / slowest)))
            cells.append(cell)
            if slowest > settings.longest_s and index + 1 < len(sizes):
                left_out.append(
                    f"{routine}, {team.name}: {people_bytes(sizes[index + 1])} and above, since {people_bytes(nbytes)} took "
                    f"{slowest:.1f} s; --longest {2 * settings.longest_s:g} goes on"
                )
                break
    given.zero_()  # sums in place stay zero however often they are summed
    return cells, left_out


def _trials(ranks: World, settings: NetSettings, cells: Sequence[_Cell], progress: Progress) -> None:
    order = sorted(cells, key=lambda cell: cell.nbytes)
    for trial in range(settings.trials):
        for number, cell in enumerate(order):
            progress(0.3 + 0.7 * (trial + number / len(order)) / settings.trials, cell.text)
            cell.seconds.append(cell.time(ranks, cell.in_a_row))
    progress(1.0, "done")


def _rows(ranks: World, cells: Sequence[_Cell], trials: int) -> list[NetRow]:
    told = ranks.gather([seconds for cell in cells for seconds in cell.seconds])
    rows = []
    for number, cell in enumerate(cells):
        by_rank = [own[number * trials : (number + 1) * trials] for own in told]
        rows.append(
            NetRow.of(
                cell.routine,
                cell.nbytes,
                cell.team.size,
                tuple(map(max, zip(*by_rank, strict=True))),
                where=cell.team.name,
                level=cell.team.level,
                groups=cell.team.groups,
                in_a_row=cell.in_a_row,
                slowest_rank=-1 if cell.routine == P2P else straggler(by_rank),  # who begins also ends a ping-pong
                wrong=cell.wrong,
            )
        )
    return rows


def straggler(by_rank: Sequence[Sequence[float]]) -> int:
    """The rank that is slower than the median rank by over 5%, in the median and in most trials; -1 if there is none.

    Args:
        by_rank: seconds of every rank by trial; zeros of one that stood by.
    """
    joined = {rank: seconds for rank, seconds in enumerate(by_rank) if any(seconds)}
    typical = [median(trial) for trial in zip(*joined.values(), strict=True)]
    slowest = max(joined, key=lambda rank: median(joined[rank]))
    late = sum(own > _STRAGGLES * of_all for own, of_all in zip(joined[slowest], typical, strict=True))
    return slowest if late > _MOST_TRIALS * len(typical) else -1


def _buffers(ranks: World, nbytes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Memory for the largest size, given and taken. Raises UnsupportedError, alike on all ranks."""
    needed = _BUFFERS * nbytes * (1 if ranks.device.type == "cuda" else ranks.ranks_per_node)
    free = torch.cuda.mem_get_info(ranks.device)[0] if ranks.device.type == "cuda" else psutil.virtual_memory().available
    least = min(told[0] for told in ranks.gather([float(free)]))
    if needed > least:
        raise UnsupportedError(
            f"--sizes: {people_bytes(nbytes)} need {people_bytes(needed)} of memory on every host, and there are "
            f"{people_bytes(int(least))}; end with a smaller size"
        )
    numel = nbytes // dtype.itemsize
    given, taken = (torch.zeros(numel, dtype=dtype, device=ranks.device) for _ in range(2))
    return given, taken


def run_rank(settings: NetSettings, progress: Progress) -> tuple[NetReport, int]:
    """Join the other ranks and measure: the report, and this rank's number. Only rank 0 tells its progress. Raises as `bench`."""
    with world(settings.backend, settings.levels, settings.timeout_s) as ranks:
        return bench(ranks, settings, progress if ranks.rank == 0 else lambda share, what: None), ranks.rank


def main(argv: Sequence[str] | None = None) -> int:
    """Run one rank with the settings given as JSON; returns the exit status."""
    (text,) = sys.argv[1:] if argv is None else argv
    try:
        report, rank = run_rank(NetSettings.model_validate_json(text), print_progress)
        if rank == 0:
            write_report(report)
    except EspressoError as error:
        print(f"{FAULT}{error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

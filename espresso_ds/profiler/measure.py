"""When to measure what: sizes grow until a time is long enough to show the bandwidth, then passes measure all, interleaved.

Nothing here knows what a probe does or how ranks talk. All ranks call `measure` alike, and every choice rests on times that they
have agreed on, so all take the same steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

Progress = Callable[[float, str], None]
"""Told the share of the work done, 0 to 1, and what is being measured."""

Agree = Callable[[Sequence[float]], list[float]]
"""Element-wise maximum over all ranks, which all ranks call together."""


@dataclass(frozen=True)
class Probe:
    """Something that takes time by size.

    `run(nbytes, count)` does it `count` times in a row, on all ranks at once, and returns this rank's mean seconds.
    """

    name: str
    sizes: tuple[int, ...]
    run: Callable[[int, int], float]
    weight: float = 1.0
    """Of the effort's `grow_below_s` and `row_s`, how much this one is worth."""


@dataclass(frozen=True)
class Effort:
    """How long to measure. Seconds."""

    grow_below_s: float = 0.12
    """The next size, usually four times as large, is tried only if this one took less."""
    row_s: float = 0.04
    """A size that takes less is done several times in a row, up to `longest_row` times: under load, links lose the credit that
    shapers and buffers give to a first short message."""
    longest_row: int = 50
    budget_s: float = 18.0
    """For all passes together; at least `passes[0]` and at most `passes[1]` are made."""
    passes: tuple[int, int] = (3, 9)


THOROUGH = Effort()
QUICK = Effort(grow_below_s=0.03, row_s=0.01, budget_s=3.0)


@dataclass
class _Cell:
    """One probe at one size: how often in a row it runs, and the agreed mean seconds of every pass so far."""

    probe: Probe
    nbytes: int
    expected_s: float
    count: int
    samples: list[float] = field(default_factory=list)

    @property
    def pass_s(self) -> float:
        return self.expected_s * self.count


def measure(probes: Sequence[Probe], effort: Effort, agree: Agree, progress: Progress) -> list[dict[int, float]]:
    """Median over the passes of the seconds by size of every probe; the slowest rank counts.

    The first run of a size only warms up: it touches memory, opens connections and decides whether a larger size is tried. Two
    sizes of every probe are measured in any case, or no line could be fitted.
    """
    cells = []
    for number, probe in enumerate(probes):
        progress(0.2 * number / len(probes), f"{probe.name}, finding sizes")
        cells += _find_sizes(probe, effort, agree)
    pass_s = sum(cell.pass_s for cell in cells)
    fewest, most = effort.passes
    passes = max(fewest, min(most, int(effort.budget_s / pass_s)))
    for number in range(passes):
        done_s, seconds = 0.0, []
        for cell in cells:
            progress(0.2 + 0.8 * (number + done_s / pass_s) / passes, f"{cell.probe.name} {people_bytes(cell.nbytes)}")
            seconds.append(cell.probe.run(cell.nbytes, cell.count))
            done_s += cell.pass_s
        for cell, slowest in zip(cells, agree(seconds), strict=True):
            cell.samples.append(slowest)
    progress(1.0, "done")
    return [{cell.nbytes: median(cell.samples) for cell in cells if cell.probe is probe} for probe in probes]


def people_bytes(nbytes: int) -> str:
    """`nbytes` for people: `256 B`, `4 KiB`, `16 MiB`."""
    for unit, size in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= size:
            return f"{nbytes / size:.3g} {unit}"
    return f"{nbytes} B"


def _find_sizes(probe: Probe, effort: Effort, agree: Agree) -> list[_Cell]:
    cells: list[_Cell] = []
    grow_below_s, row_s = probe.weight * effort.grow_below_s, probe.weight * effort.row_s
    for nbytes in probe.sizes:
        (seconds,) = agree([probe.run(nbytes, 1)])
        if seconds >= grow_below_s:  # once more: a hiccup must not end the growth
            (again,) = agree([probe.run(nbytes, 1)])
            seconds = min(seconds, again)
        count = max(1, min(effort.longest_row, int(row_s / seconds)))
        cells.append(_Cell(probe, nbytes, seconds, count))
        if seconds >= grow_below_s and len(cells) >= 2:
            break
    return cells

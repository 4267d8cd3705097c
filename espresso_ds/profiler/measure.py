"""When to measure what: sizes grow until a time is long enough to show the bandwidth, then passes measure all, interleaved.

What came out far off its own median is measured again.

Nothing here knows what a probe does or how ranks talk. All ranks call `measure` alike, and every choice rests on times that they
have agreed on, so all take the same steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import NamedTuple

from ..core.people import people_bytes

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
    budget_s: float = 12.0
    """For all passes together; at least `passes[0]` and at most `passes[1]` are made, with shorter rows if they must be."""
    passes: tuple[int, int] = (3, 9)
    again: int = 3
    """How often at most a size is measured again for passes that were far off, in a fifth of `budget_s` for all of them."""


THOROUGH = Effort()
QUICK = Effort(grow_below_s=0.03, row_s=0.01, budget_s=3.0)
FAR = 1.5
"""The factor beyond which a time is far off its median, a host or a link off those of others."""


class Timing(NamedTuple):
    """Seconds, the median over the passes, and their interquartile range over the median."""

    seconds: float
    spread: float


@dataclass
class _Cell:
    """One probe at one size: how often in a row it runs, and the agreed mean seconds of every pass so far."""

    probe: Probe
    nbytes: int
    expected_s: float
    count: int
    samples: list[float] = field(default_factory=list)
    again: int = 0

    @property
    def pass_s(self) -> float:
        return self.expected_s * self.count

    @property
    def far(self) -> int:
        """How many samples are far off the median."""
        middle = median(self.samples)
        return sum(not middle / FAR <= sample <= middle * FAR for sample in self.samples)

    @property
    def timing(self) -> Timing:
        middle = median(self.samples)
        if len(self.samples) < 2:
            return Timing(middle, 0.0)
        low, _, high = quantiles(self.samples, n=4, method="inclusive")
        return Timing(middle, (high - low) / middle)


def measure(probes: Sequence[Probe], effort: Effort, agree: Agree, progress: Progress) -> list[dict[int, Timing]]:
    """Median and spread over the passes of the seconds by size of every probe; the slowest rank counts.

    The first run of a size only warms up: it touches memory, opens connections and decides whether a larger size is tried. Two
    sizes of every probe are measured in any case, or no line could be fitted. For every sample that is far off its median one
    more is taken, and kept beside it: an outlier loses its weight, while a link that is restless stays so in the spread.
    """
    cells = []
    for number, probe in enumerate(probes):
        progress(0.2 * number / len(probes), f"{probe.name}, finding sizes")
        cells += _find_sizes(probe, effort, agree)
    fewest, most = effort.passes
    _fit_rows(cells, effort.budget_s / fewest)
    pass_s = sum(cell.pass_s for cell in cells)
    passes = max(fewest, min(most, int(effort.budget_s / pass_s)))
    for number in range(passes):
        _one_pass(cells, agree, part(progress, 0.2 + 0.75 * number / passes, 0.2 + 0.75 * (number + 1) / passes))
    left_s = effort.budget_s / 5
    for number in range(effort.again):
        restless = []
        for cell in cells:
            if cell.far > cell.again and cell.pass_s <= left_s:
                left_s -= cell.pass_s
                cell.again += 1
                restless.append(cell)
        _one_pass(restless, agree, part(progress, 0.95 + 0.05 * number / effort.again, 0.95 + 0.05 * (number + 1) / effort.again))
    progress(1.0, "done")
    return [{cell.nbytes: cell.timing for cell in cells if cell.probe is probe} for probe in probes]


def part(progress: Progress, begin: float, end: float) -> Progress:
    """Where to report a part of the work that goes from share `begin` to `end`."""
    return lambda share, what: progress(begin + share * (end - begin), what)


def _one_pass(cells: Sequence[_Cell], agree: Agree, progress: Progress) -> None:
    """One more sample of every cell."""
    if not cells:
        return
    done_s, seconds, all_s = 0.0, [], sum(cell.pass_s for cell in cells)
    for cell in cells:
        progress(done_s / all_s, f"{cell.probe.name} {people_bytes(cell.nbytes)}")
        seconds.append(cell.probe.run(cell.nbytes, cell.count))
        done_s += cell.pass_s
    for cell, slowest in zip(cells, agree(seconds), strict=True):
        cell.samples.append(slowest)


def _fit_rows(cells: Sequence[_Cell], pass_s: float) -> None:
    """Shorten all rows alike, down to one of each, until a pass takes about `pass_s`."""
    wanted_s = sum(cell.pass_s for cell in cells)
    if wanted_s > pass_s:
        for cell in cells:
            cell.count = max(1, int(cell.count * pass_s / wanted_s))


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

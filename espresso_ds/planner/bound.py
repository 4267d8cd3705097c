"""A lower bound on the step time that holds for every strategy, so that a plan can say how far from the best it may be.

A strategy cuts the tensors, in their order, into units, gives each a choice of the menu, and may send what it compresses in
chunks. Seconds count from the start of backward, which takes b undisturbed; T is the end of the step without forward and after.

Work. Tensor j in any buffer with choice c loads resource r for at least numel_j rate_cr (floors.py). It asks for r only after
backward has come as far as ready_j. So r, which serves one at a time, is busy after ready_i with all of what tensors i and
later load it with, and for every i and r

    T >= ready_i + sum over j >= i of numel_j sum_c x_jc rate_cr        x_jc: the share of tensor j that has choice c

Compute. Codec work on the tensor's own device and backward exclude each other: T >= b + all of that work.

CPU. While one second of codec work on the CPU and backward run together, both take 1 + k seconds. Say that s of the S seconds
of CPU work of tensors i and later are done before backward's end E. What is done beside backward takes longer, and so T >=
ready_i + S + k s; the rest follows backward, T >= E + S - s. Backward loses at least k seconds for each of s, also where it
stands still for its own device's codec meanwhile: E >= b + k s. If k >= 1, the last two give T >= b + S; else the first, times
1 - k, plus the second with E >= ready_i + (b - ready_i) + k s, times k, gives T >= ready_i + S + k (b - ready_i). With w =
min(1, k) that is

    T >= ready_i + S + w (b - ready_i)

Of all work, what is done after E on the own device, G', or on the CPU, S', makes T >= E + (1 - w) G' + w S'. Before E, a second
on the own device costs backward that second, of which CPU work beside it may claim k / (1 + k) as its own; 1 / (1 + k) >= 1 - w
is left. Hence T >= b + (1 - w) G + w S.

Links. Where n links are busy beside backward, it loses n l / (1 + n l) of the time or more, l being the cluster's own
contention; with q = l / (1 + n l) for the links there are, likewise T >= b + (1 - n q) G + q L, L being the seconds of work on
all links.

Way. A unit that holds tensor j ends no sooner than ready_j + way_c(numel_j) (floors.py), so T >= ready_j + sum_c x_jc way_c.

A strategy is a solution with x_jc either 0 or 1, hence the least T of all solutions of this linear program is a lower bound.
Tensors between two marks share x, and rows are written at marks only: to leave out rows and to average x keeps the bound valid.
Choices that would take a tensor alone past a known plan's time need no look: then the bound is that time or the program's.

The program has a few hundred rows and a hundred thousand columns, most of which are of no use: columns are added as the duals
ask for them. Whatever the solver's duals y >= 0 with sum 1 are, sum over rows of y base + sum over blocks of the least price of
any choice is a lower bound (weak duality), and it is computed here from all choices: the result does not hang on the solver's
word.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np

from ..core.profile import ModelTrace
from .cost import LINKS, Resource
from .floors import Floats, Floors, Places
from .menu import Menu

MARKS = 24
"""Parts of about equally many elements into which the trace is cut."""
LARGE = 0.1
"""Share of all elements from which on a tensor is looked at by itself, as the last one is."""
ROUNDS = 30
"""Most times that columns are added."""
CLOSE = 1e-4
"""Share of the bound that a further column must promise."""
ROUNDING = 1e-9
"""Share by which the result is lowered for rounding errors in sums."""

_WAY = len(Resource)  # the column after the resources
_NAMES = {
    Resource.CPU: "CPU",
    Resource.INTRA: "links inside the node",
    Resource.INTER: "links between nodes",
}


@dataclass(frozen=True)
class Bound:
    """Seconds that no strategy's step can be below, and for people what keeps it there."""

    seconds: float
    limit: str


@dataclass(frozen=True)
class Row:
    """T >= base + sum over blocks `start` .. `stop` - 1 of weights . costs of the block's choice."""

    base: float
    start: int
    stop: int
    weights: tuple[float, ...]
    limit: str


@dataclass(frozen=True)
class Block:
    """Tensors first .. last of the trace, or those of them that may or may not be compressed, with the choices they have.

    `costs` are seconds on each resource, and of the whole way where the block is one tensor (0: unknown); (choices, 5).
    """

    first: int
    last: int
    costs: Floats


def lower_bound(trace: ModelTrace, menu: Menu, incumbent_s: float = float("inf"), exact: Collection[int] = ()) -> Bound:
    """Seconds that no strategy's F(S) can be below; see above.

    Args:
        trace: tensors with ready times that do not descend.
        menu: the choices for every unit.
        incumbent_s: F(S) of a known plan; the bound is then no more than that, and found sooner.
        exact: indices of tensors that are never compressed.
    """
    fixed_s = trace.forward_s + trace.after_s
    limit_s = incumbent_s - fixed_s
    blocks = _blocks(trace, menu, limit_s, frozenset(exact))
    if any(len(block.costs) == 0 for block in blocks):
        return Bound(incumbent_s, "the plan at hand")
    seconds, limit = _relaxed(_Program(blocks, list(_rows(trace, menu, blocks))), limit_s)
    seconds *= 1 - ROUNDING
    if seconds <= trace.backward_s:
        limit = "backward"
    return Bound(min(incumbent_s, max(trace.compute_s, fixed_s + seconds)), limit)


def _blocks(trace: ModelTrace, menu: Menu, limit_s: float, exact: frozenset[int]) -> list[Block]:
    """The trace cut at marks; each tensor of interest is a block of its own."""
    numel = np.array([tensor.numel for tensor in trace.tensors])
    floors = Floors(menu, int(numel.sum()))
    alone = {len(numel) - 1, *np.flatnonzero(numel >= LARGE * numel.sum()).tolist()}
    edges = np.searchsorted(numel.cumsum(), numel.sum() * np.arange(1, MARKS) / MARKS)
    marks = sorted({0, *edges.tolist(), *alone, *(place + 1 for place in alone)} - {len(numel)})
    blocks = []
    for start, stop in zip(marks, [*marks[1:], len(numel)], strict=True):
        for choices, mine in (
            (menu.everything, [place for place in range(start, stop) if place not in exact]),
            (menu.uncompressed, [place for place in range(start, stop) if place in exact]),
        ):
            if mine:
                total = int(numel[mine].sum())
                costs = np.column_stack([floors.rates[choices] * total, np.zeros(len(choices))])
                if start in alone:
                    costs = _alone(floors, costs, choices, total, limit_s - trace.tensors[start].ready_s)
                blocks.append(Block(start, stop - 1, costs))
    return blocks


def _alone(floors: Floors, costs: Floats, choices: Places, numel: int, most_s: float) -> Floats:
    """The costs of a tensor's choices with its way, without those that take longer than `most_s`."""
    kept = costs.max(axis=1) <= most_s
    costs, choices = costs[kept], choices[kept]
    costs[:, _WAY] = floors.ways(numel, choices)
    return costs[costs[:, _WAY] <= most_s]


def _rows(trace: ModelTrace, menu: Menu, blocks: list[Block]) -> Iterator[Row]:
    """The constraints of the program; see above."""
    every, tensors, backward_s = len(blocks), trace.tensors, trace.backward_s
    used = {resource for resource in Resource if any(block.costs[:, resource].any() for block in blocks)}
    slowed, link_slowed = menu.costs.contention, menu.costs.link_contention
    share = min(1.0, slowed)
    yield Row(backward_s, 0, every, _weights({Resource.COMPUTE: 1.0}), "backward and codec work on its device")
    if slowed > 0 and Resource.CPU in used:
        weights = _weights({Resource.COMPUTE: 1 - share, Resource.CPU: share})
        yield Row(backward_s, 0, every, weights, "backward slowed by codec work on the CPU")
    links = [link for link in LINKS if link in used]
    if link_slowed > 0 and links:
        delay = link_slowed / (1 + len(links) * link_slowed)
        weights = _weights({Resource.COMPUTE: 1 - len(links) * delay, **dict.fromkeys(links, delay)})
        yield Row(backward_s, 0, every, weights, "backward slowed by busy links")
    for place, block in enumerate(blocks):
        tensor = tensors[block.first]
        if block.costs[:, _WAY].any():
            yield Row(tensor.ready_s, place, place + 1, _weights({_WAY: 1.0}), f"the way of {tensor.name!r}")
        for resource in used - {Resource.COMPUTE}:
            base = tensor.ready_s + (share * (backward_s - tensor.ready_s) if resource is Resource.CPU else 0.0)
            yield Row(base, place, every, _weights({resource: 1.0}), f"{_NAMES[resource]} from {tensor.name!r} on")


def _weights(of: dict[int, float]) -> tuple[float, ...]:
    return tuple(of.get(column, 0.0) for column in range(_WAY + 1))


class _Program:
    """The linear program over some of the choices of each block, which grows."""

    def __init__(self, blocks: list[Block], rows: list[Row]) -> None:
        self.rows = rows
        self._blocks = blocks
        self._base = np.array([row.base for row in rows])
        self._weights = np.array([row.weights for row in rows])
        starts, stops = np.array([row.start for row in rows]), np.array([row.stop for row in rows])
        self._holds = [(starts <= place) & (place < stops) for place in range(len(blocks))]
        self._columns: list[list[int]] = [[] for _ in blocks]
        for place, block in enumerate(blocks):
            work = block.costs[:, :_WAY]
            for price in (*block.costs.T, work.sum(axis=1), work.max(axis=1)):
                self._add(place, int(price.argmin()))

    def solve(self) -> tuple[float, Floats]:
        """The least T with the columns at hand, and the rows' duals, at least 0 and with sum 1."""
        from scipy.optimize import linprog  # takes 0.3 s to import

        columns = [
            (self._weights @ block.costs[chosen].T) * holds[:, None]
            for block, chosen, holds in zip(self._blocks, self._columns, self._holds, strict=True)
        ]
        owner = np.repeat(np.arange(len(columns)), [len(chosen) for chosen in self._columns])
        matrix = np.hstack([*columns, -np.ones((len(self.rows), 1))])
        shares = np.zeros((len(columns), len(owner) + 1))
        shares[owner, np.arange(len(owner))] = 1.0
        goal = np.append(np.zeros(len(owner)), 1.0)
        result = linprog(goal, matrix, -self._base, shares, np.ones(len(columns)), method="highs")
        duals = np.maximum(0.0, -result.ineqlin.marginals)
        return float(result.fun), duals / duals.sum()

    def certify(self, duals: Floats) -> float:
        """The lower bound that these duals prove; adds the columns that they ask for."""
        seconds = float(duals @ self._base)
        for place, (block, holds) in enumerate(zip(self._blocks, self._holds, strict=True)):
            price = block.costs @ ((duals * holds) @ self._weights)
            least = int(price.argmin())
            seconds += float(price[least])
            self._add(place, least)
        return seconds

    def _add(self, place: int, choice: int) -> None:
        if choice not in self._columns[place]:
            self._columns[place].append(choice)


def _relaxed(program: _Program, limit_s: float) -> tuple[float, str]:
    """The best lower bound found, up to `limit_s`, and the rows that it is made of."""
    best, limit = -float("inf"), ""
    for _ in range(ROUNDS):
        promise, duals = program.solve()
        seconds = program.certify(duals)
        if seconds > best:
            best, limit = seconds, _explain(program.rows, duals)
        if best >= limit_s or promise - best <= CLOSE * best:
            break
    return best, limit


def _explain(rows: list[Row], duals: Floats) -> str:
    """The rows of most weight: by how much of its own a relief of each would shorten the step."""
    top = [place for place in np.argsort(-duals, kind="stable")[:3].tolist() if duals[place] >= 0.01]
    return ", ".join(f"{rows[place].limit} ({duals[place]:.0%})" for place in top)

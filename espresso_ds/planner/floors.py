"""What no strategy can do cheaper: least seconds of every choice, per element in any buffer, and of the unit that comes last.

A unit may hold any number of elements up to those of the whole trace and travel in any number of chunks, so that these are bounds
over all such sizes. Results have one column per aspect:

    work of r up to the k-th routine, k = 1 .. lanes      column (k - 1) * 4 + r
    work of r                                              column lanes * 4 + r
    the whole way from ready to done                       the last column, 0 per element

where r is a `Resource` and a choice with fewer routines has its last one for the k-th.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..core.option import Device
from .cost import LINKS, Operation, Resource
from .curves import Curve
from .menu import Menu

PIECES = 8
"""Numbers of chunks that are looked at one by one."""

Floats = NDArray[np.float64]
Places = NDArray[np.int_]
_RESOURCES = len(Resource)


class Floors:
    """Lower bounds of the costs of a menu's choices."""

    def __init__(self, menu: Menu, most: int) -> None:
        """Index the menu for a trace of `most` elements."""
        self._menu = menu
        self._lowest: dict[int, Curve] = {}
        self._steps = menu.steps[:, : int(menu.counts.max())].astype(int)  # place -1: no step
        of_operation = np.array([*(menu.costs.resource(op) for op in menu.operations), -1])
        self._resource = of_operation[self._steps]
        sends = np.isin(self._resource, [int(link) for link in LINKS])
        self._routines = sends.sum(axis=1)
        self._lane = np.cumsum(sends, axis=1) - sends
        self.lanes = int(self._routines.max())
        """Most routines of a choice."""
        self.compresses = np.ones(len(menu.choices), dtype=bool)
        self.compresses[menu.uncompressed] = False
        self.rates: Floats = self._rates(most)
        """Least seconds per element in a unit or chunk of any size; (choices, aspects)."""

    def work(self, resource: Resource, routine: int | None = None) -> int:
        """The column of the work on a resource, up to a routine (from 1) or in all."""
        return (self.lanes if routine is None else routine - 1) * _RESOURCES + resource

    def last(self, numel: int, choices: Places) -> Floats:
        """Least seconds of a last unit that holds `numel` elements or more; (len(choices), aspects).

        In the column of the k-th routine: work on r up to it by the first piece, and then the rest of the way of all pieces; no
        less than all work on r, which also stands there where a choice has fewer than k routines.

        In one piece, a way takes the sum of its steps. Of p pieces (core/chunks.py) all but the last have numel / p elements or
        more, and the last has at most (p + 1) world sizes less. All go the same way in the same order, so that what the first does
        before its first use of a resource, all uses of that resource, and what some piece does after its last one follow each
        other. In more than PIECES pieces, each is small: the least rate at such sizes replaces their number. All of this only
        grows with the size of the unit, since `_least` does.
        """
        found = np.zeros((len(choices), self.rates.shape[1]))
        for cut in (False, True):
            rows = np.flatnonzero(self.compresses[choices] == cut)
            if len(rows):
                found[rows] = self._last(numel, choices[rows], PIECES if cut else 1)
        work = self.rates[choices, -1 - _RESOURCES : -1] * numel
        found[:, :-1] = np.maximum(found[:, :-1], np.tile(work, self.lanes + 1))
        return found

    def _last(self, numel: int, choices: Places, pieces: int) -> Floats:
        """`last` before the work as a whole is looked at, for choices that may travel in that many pieces or, if not 1, more."""
        counts = np.arange(1, pieces + 1)
        rest = np.maximum(1, numel // counts - (counts + 1) * self._menu.costs.world)
        rest[0] = numel
        table = self._table(np.concatenate([-(-numel // counts), [1], rest, [1]]))
        rates = np.array([*(self._rate(op, max(1, numel // pieces)) for op in self._menu.operations), 0.0])
        steps, resource, lane = self._steps[choices], self._resource[choices], self._lane[choices]
        seconds = table[steps]  # (choices, steps, sizes): of every number of pieces, then of the last piece of as many
        first, end = slice(0, pieces + 1), slice(pieces + 1, None)
        many = rates[steps] * numel
        found = np.zeros((len(choices), self.rates.shape[1]))

        def way(kept: NDArray[np.bool_]) -> Floats:
            """Least seconds for the kept steps of all pieces, by number of pieces, the last for more than PIECES."""
            taken = seconds * kept[:, :, None]
            ends = taken.cumsum(axis=1)
            total = ends[:, -1]
            least = total[:, first].copy()
            for place in Resource:
                uses = kept & (resource == place)
                rows = np.flatnonzero(uses.any(axis=1))
                mine = uses[rows]
                opening, final = mine.argmax(axis=1), mine.shape[1] - 1 - mine[:, ::-1].argmax(axis=1)
                head = (ends[rows, opening] - taken[rows, opening])[:, first]
                tail = (total[rows] - ends[rows, final])[:, end]
                load = np.einsum("csz,cs->cz", taken[rows], mine)
                busy = (counts - 1) * load[:, first][:, :-1] + load[:, end][:, :-1]
                busy = np.column_stack([busy, (many[rows] * mine).sum(axis=1)])
                least[rows] = np.maximum(least[rows], head + busy + tail)
            return (least if pieces > 1 else least[:, :1])

        valid = resource >= 0
        for k in range(1, self.lanes + 1):
            reaches = self._routines[choices] >= k
            if not reaches.any():
                continue
            remaining = way(valid & (lane >= k))
            for place in Resource:
                own = np.einsum("csz,cs->cz", seconds, valid & (lane < k) & (resource == place))[:, first][:, : remaining.shape[1]]
                found[:, self.work(place, k)] = (own + remaining).min(axis=1) * reaches
        found[:, -1] = way(valid).min(axis=1)
        return found

    def _table(self, sizes: Places) -> Floats:
        """Least seconds of every operation, and of no operation, on as many elements or more."""
        table = np.zeros((len(self._menu.operations) + 1, len(sizes)))
        for place, op in enumerate(self._menu.operations):
            table[place] = self._least(op, sizes)
        return table

    def _rates(self, most: int) -> Floats:
        """Least seconds per element in buffers of at most `most`, by aspect."""
        each = np.array([*(self._rate(op, most) for op in self._menu.operations), 0.0])[self._steps]
        columns = []
        for k in range(1, self.lanes + 2):
            until = np.minimum(k, self._routines) if k <= self.lanes else self._routines + 1
            mine = each * (self._lane < until[:, None])
            columns += [(mine * (self._resource == place)).sum(axis=1) for place in Resource]
        return np.stack([*columns, np.zeros(len(each))], axis=1)

    def _least(self, op: Operation, numel: Places) -> Floats:
        """Least seconds of an operation on `numel` elements or more."""
        costs = self._menu.costs
        seconds, payload = costs.curves(op)
        elements = -(-numel // op.divisor)
        if isinstance(op.action.at, Device):
            return op.rows * self._floor(seconds)(elements)
        nbytes = elements * costs.element_bytes if payload is None else op.rows * np.maximum(1.0, self._floor(payload)(elements))
        return self._floor(seconds)(nbytes)

    def _rate(self, op: Operation, most: int) -> float:
        """Least seconds of an operation per element of a buffer of at most `most`: a product of least rates."""
        costs = self._menu.costs
        seconds, payload = costs.curves(op)
        elements = -(-most // op.divisor)
        if isinstance(op.action.at, Device):
            return op.rows / op.divisor * seconds.least_rate(elements)
        if payload is None:
            return costs.element_bytes / op.divisor * seconds.least_rate(float(costs.nbytes(op, most)))
        sizes = np.array([1, elements, *(x for x in payload.x if 1 < x < elements)])
        most_bytes = op.rows * max(1.0, float(payload(sizes).max()))
        return op.rows / op.divisor * payload.least_rate(elements) * seconds.least_rate(most_bytes)

    def _floor(self, curve: Curve) -> Curve:
        """The largest curve of such points that never falls and is nowhere above: what any larger size takes at least."""
        if id(curve) not in self._lowest:
            lowest = np.minimum.accumulate(np.asarray(curve.y)[::-1])[::-1]
            self._lowest[id(curve)] = replace(curve, y=tuple(lowest.tolist()))
        return self._lowest[id(curve)]

"""What no strategy can do cheaper: least seconds of every choice, per element in any buffer and for one tensor's whole way.

A tensor may travel in a unit of any size up to the whole trace's and in any number of chunks. These are bounds over all of that.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..core.option import Device
from .cost import Operation, Resource
from .menu import Menu

PIECES = 16
"""Numbers of chunks that are looked at one by one."""

Floats = NDArray[np.float64]
Places = NDArray[np.int_] | NDArray[np.int32]


class Floors:
    """Lower bounds of what a menu's choices cost.

    Attributes:
        rates: least seconds per element on each resource in a buffer of any size; (choices, resources).
    """

    def __init__(self, menu: Menu, most: int) -> None:
        """Index the operations of the menu for a trace of `most` elements."""
        self._costs = menu.costs.never_falling()
        self._operations = menu.operations
        self._steps = menu.steps[:, : int(menu.counts.max())].astype(int)  # no step: -1, the place after the last operation
        self._resource = np.array([*(menu.costs.resource(op) for op in self._operations), -1])[self._steps]
        self._compresses = np.ones(len(menu.choices), dtype=bool)
        self._compresses[menu.uncompressed] = False
        each = self._of_operations(lambda op: self._rate(op, most))[self._steps]
        self.rates: Floats = np.stack([(each * (self._resource == place)).sum(axis=1) for place in Resource], axis=1)

    def ways(self, numel: int, choices: Places) -> Floats:
        """Least seconds from ready to done of any unit that holds `numel` elements or more, by choice; (len(choices),).

        In one piece it takes the sum of its steps. Of p pieces (core/chunks.py) all but the last have numel / p elements or more,
        and the last has at most (p + 1) world sizes less. All go the same way in the same order, so that what the first does
        before its first use of a resource, all uses of that resource, and what some piece does after its last one follow each
        other. Of more than P = PIECES pieces, either none is larger than numel / P, and each element costs the least rate at
        such sizes, or P are, which costs no less. It all holds for larger units too, since `_least` never falls.
        """
        found = np.zeros(len(choices))
        for cut in (False, True):
            rows = np.flatnonzero(self._compresses[choices] == cut)
            if len(rows):
                found[rows] = self._ways(numel, choices[rows], PIECES) if cut else self._whole(numel, choices[rows])
        return found

    def _whole(self, numel: int, choices: Places) -> Floats:
        sizes = np.array([numel])
        return self._of_operations(lambda op: float(self._least(op, sizes)[0]))[self._steps[choices]].sum(axis=1)

    def _ways(self, numel: int, choices: Places, most: int) -> Floats:
        """`ways` of choices that may travel in chunks: the least over 1 .. most pieces, and more than that."""
        counts = np.arange(1, most + 1)
        rest = np.maximum(1, numel // counts - (counts + 1) * self._costs.world)
        rest[0] = numel
        sizes = np.concatenate([-(-numel // counts), [1], rest, [1]])  # of the first piece, then of the last one
        first, last = slice(0, most + 1), slice(most + 1, None)
        table = np.zeros((len(self._operations) + 1, len(sizes)))
        table[:-1] = [self._least(op, sizes) for op in self._operations]
        small = self._of_operations(lambda op: self._rate(op, max(1, -(-numel // most)))) * numel
        steps, resource = self._steps[choices], self._resource[choices]
        seconds = table[steps]  # (choices, steps, sizes)
        ends = seconds.cumsum(axis=1)
        least = ends[:, -1, first].copy()
        for place in Resource:
            uses = resource == place
            rows = np.flatnonzero(uses.any(axis=1))
            mine = uses[rows]
            opening, final = mine.argmax(axis=1), mine.shape[1] - 1 - mine[:, ::-1].argmax(axis=1)
            before = ends[rows, opening] - seconds[rows, opening]
            after = ends[rows, -1] - ends[rows, final]
            load = np.einsum("csz,cs->cz", seconds[rows], mine)
            busy = (np.append(counts, 0) - 1) * load[:, first] + load[:, last]
            busy[:, -1] = (small[steps[rows]] * mine).sum(axis=1)
            least[rows] = np.maximum(least[rows], before[:, first] + busy + after[:, last])
        return least.min(axis=1)

    def _of_operations(self, seconds: Callable[[Operation], float]) -> Floats:
        """A value of every operation, and 0 for no step."""
        return np.array([*map(seconds, self._operations), 0.0])

    def _least(self, op: Operation, numel: Places) -> Floats:
        """Least seconds of an operation on `numel` elements or more."""
        seconds, payload = self._costs.curves(op)
        elements = -(-numel // op.divisor)
        if isinstance(op.action.at, Device):
            return op.rows * seconds(elements)
        each = elements * self._costs.element_bytes if payload is None else np.maximum(1.0, payload(elements))
        return seconds(each if payload is None else op.rows * each)

    def _rate(self, op: Operation, most: int) -> float:
        """Least seconds of an operation per element of a buffer of at most `most`: a product of least rates of the floors."""
        seconds, payload = self._costs.curves(op)
        elements = -(-most // op.divisor)
        if isinstance(op.action.at, Device):
            return op.rows / op.divisor * seconds.least_rate(elements)
        if payload is None:
            return self._costs.element_bytes / op.divisor * seconds.least_rate(elements * self._costs.element_bytes)
        most_bytes = op.rows * max(1.0, float(payload(elements)))
        return op.rows / op.divisor * payload.least_rate(elements) * seconds.least_rate(most_bytes)

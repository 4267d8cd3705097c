"""What a plan must keep to beyond the options of its menu: exact tensors, the memory of residuals, an error budget."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import accumulate, product

import numpy as np

from ..core.option import Option
from ..core.profile import ModelTrace
from .memory import feedback_per_element, precision_of
from .menu import Choice, Chosen, Menu
from .timeline import Unit
from .trials import Trials

_FREE = 0
"""The class of choices that use up no limit."""


class Limits:
    """Which choices a unit may have, given those of the others."""

    def __init__(
        self,
        trace: ModelTrace,
        menu: Menu,
        exact: Collection[int] = (),
        residual_bytes: float | None = None,
        error_budget: float | None = None,
    ) -> None:
        """Set up the limits.

        Args:
            trace: tensors in the order of the wire.
            menu: the choices there are.
            exact: indices of tensors that are never compressed.
            residual_bytes: most bytes of feedback of one rank; None: no limit.
            error_budget: most relative error, as the mean over all elements of that of the codec in use; None: no limit.
        """
        self.exact = frozenset(exact)
        self._exact_before = list(accumulate((index in self.exact for index in range(len(trace.tensors))), initial=0))
        self._place = menu.place
        self._lossy = np.array([choice.option.compresses for choice in menu.choices])
        use: list[list[float]] = []  # by limit and choice: what an element uses up
        self._most: list[float] = []
        if residual_bytes is not None:
            self._most.append(residual_bytes)
            use.append([_feedback_bytes(choice, menu, precision_of(trace)) for choice in menu.choices])
        if error_budget is not None:
            self._most.append(error_budget * sum(tensor.numel for tensor in trace.tensors))
            use.append(menu.losses.tolist())
        classes: dict[tuple[float, ...], int] = {(0.0,) * len(use): _FREE}  # choices that use up the same are of one class
        self._class = np.array(
            [classes.setdefault(each, len(classes)) for each in zip(*use, strict=True)] if use else [0] * len(menu.choices)
        )
        self._used = list(classes)
        self._known: dict[tuple[int, int], tuple[Option, int]] = {}
        self._subsets: dict[tuple[bytes, tuple[int, ...]], Chosen] = {}

    def allowed(self, trials: Trials, place: int, choices: Chosen) -> Chosen:
        """Those of the choices that the unit at a place may have."""
        unit = trials.at(place)
        if self.is_exact(unit):
            return self._exact_ones(choices)
        if not self._most:
            return choices
        others = [other for other in trials.units if other is not unit]
        return self._of_classes(
            choices, tuple(c for c in range(len(self._used)) if c == _FREE or self._fits(others, [(unit.numel, c)]))
        )

    def allow(self, trials: Trials, place: int, choice: int) -> bool:
        """Whether the unit at a place may have this choice."""
        return len(self.allowed(trials, place, np.array([choice], dtype=np.int32))) > 0

    def allow_all(self, units: Sequence[Unit]) -> bool:
        """Whether a whole plan keeps to the limits."""
        return not any(unit.option.compresses and self.is_exact(unit) for unit in units) and self._fits(units, [])

    def allow_merged(self, trials: Trials, left: int, right: int, choice: int) -> bool:
        """Whether two neighbours may travel as one unit with this choice."""
        if not self._lossy[choice]:
            return True
        pair = trials.at(left), trials.at(right)
        if any(map(self.is_exact, pair)):
            return False
        if not self._most:
            return True
        others = [other for other in trials.units if other is not pair[0] and other is not pair[1]]
        return self._fits(others, [(pair[0].numel + pair[1].numel, int(self._class[choice]))])

    def allow_cut(self, trials: Trials, places: Sequence[int], units: Sequence[Unit]) -> bool:
        """Whether these units may take the place of those at the places."""
        if any(unit.option.compresses and self.is_exact(unit) for unit in units):
            return False
        if not self._most:
            return True
        own = {id(trials.at(place)) for place in places}
        others = [unit for unit in trials.units if id(unit) not in own]
        return self._fits(others, [(unit.numel, self._class_of(unit)) for unit in units])

    def allowed_pairs(
        self, trials: Trials, places: tuple[int, int], choices: tuple[Chosen, Chosen]
    ) -> Iterator[tuple[Chosen, Chosen]]:
        """Groups of choices that two units may have at once: any of the first group with any of the second."""
        units = [trials.at(place) for place in places]
        left, right = (self._exact_ones(each) if self.is_exact(unit) else each for unit, each in zip(units, choices, strict=True))
        if not self._most:
            yield left, right
            return
        others = [other for other in trials.units if all(other is not unit for unit in units)]
        for both in product(*(np.unique(self._class[each]).tolist() for each in (left, right))):
            if self._fits(others, [(unit.numel, each) for unit, each in zip(units, both, strict=True)]):
                yield self._of_classes(left, (both[0],)), self._of_classes(right, (both[1],))

    def fit(self, numel: int, choice: int) -> bool:
        """Whether so many elements may have this choice, if all others are uncompressed."""
        return self._fits((), [(numel, int(self._class[choice]))])

    def is_exact(self, unit: Unit) -> bool:
        """Whether the unit holds a tensor that is never compressed."""
        return self.has_exact(unit.start, unit.stop)

    def has_exact(self, start: int, stop: int) -> bool:
        """Whether any of the tensors `start` to `stop` - 1 is never compressed."""
        return self._exact_before[stop] > self._exact_before[start]

    def _class_of(self, unit: Unit) -> int:
        key = id(unit.option), unit.codec  # hashing the option itself takes longer than all else here
        if key not in self._known:
            self._known[key] = unit.option, int(self._class[self._place[Choice(unit.option, unit.codec)]])
        return self._known[key][1]

    def _fits(self, others: Sequence[Unit], more: Sequence[tuple[int, int]]) -> bool:
        """Whether other units, and so many elements of such classes, keep to all limits."""
        used = [(unit.numel, self._class_of(unit)) for unit in others] if self._most else []
        return all(
            sum(numel * self._used[each][limit] for numel, each in (*used, *more)) <= most
            for limit, most in enumerate(self._most)
        )

    def _exact_ones(self, choices: Chosen) -> Chosen:
        return choices[~self._lossy[choices]]

    def _of_classes(self, choices: Chosen, classes: tuple[int, ...]) -> Chosen:
        key = choices.tobytes(), classes
        if key not in self._subsets:
            self._subsets[key] = choices[np.isin(self._class[choices], classes)]
        return self._subsets[key]


def _feedback_bytes(choice: Choice, menu: Menu, precision: str) -> float:
    if not choice.option.compresses:
        return 0.0
    return feedback_per_element(choice.option, menu.costs.codecs[choice.codec].compressor, menu.costs.shape, precision)

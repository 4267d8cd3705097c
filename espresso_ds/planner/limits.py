"""What a plan must keep to beyond the options of its menu: exact tensors, the memory of residuals, an error budget."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import accumulate, product

import numpy as np

from ..core.profile import ModelTrace
from .menu import NO_CODEC, Chosen, Menu
from .timeline import Unit
from .trials import Trials

RESIDUAL_BYTES = 4
"""Bytes of one element of error feedback, which is kept in float32."""


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
            residual_bytes: most bytes of error feedback of one rank; None: no limit.
            error_budget: most relative error, as the mean over all elements of that of the codec in use; None: no limit.
        """
        codecs = menu.costs.codecs
        self.exact = frozenset(exact)
        self._exact_before = list(accumulate((index in self.exact for index in range(len(trace.tensors))), initial=0))
        self._caps: list[tuple[float, list[float]]] = []  # the most, and what an element costs with each codec
        if residual_bytes is not None:
            kept = [RESIDUAL_BYTES * float(codec.compressor.feedback != "none") for codec in codecs]
            self._caps.append((residual_bytes, kept))
        if error_budget is not None:
            numel = sum(tensor.numel for tensor in trace.tensors)
            self._caps.append((error_budget * numel, [codec.relative_error for codec in codecs]))
        self._codec_of = menu.codec
        self._subsets: dict[tuple[bytes, tuple[int, ...]], Chosen] = {}

    def allowed(self, trials: Trials, place: int, choices: Chosen) -> Chosen:
        """Those of the choices that the unit at a place may have."""
        unit = trials.at(place)
        if self.is_exact(unit):
            return self._with_codecs(choices, (NO_CODEC,))
        if not self._caps:
            return choices
        others = [other for other in trials.units if other is not unit]
        codecs = range(len(self._caps[0][1]))
        return self._with_codecs(choices, (NO_CODEC, *(codec for codec in codecs if self._fits(others, [(unit.numel, codec)]))))

    def allow_merged(self, trials: Trials, left: int, right: int, choice: int) -> bool:
        """Whether two neighbours may travel as one unit with this choice."""
        codec = int(self._codec_of[choice])
        if codec == NO_CODEC:
            return True
        pair = trials.at(left), trials.at(right)
        if any(map(self.is_exact, pair)):
            return False
        if not self._caps:
            return True
        others = [other for other in trials.units if other is not pair[0] and other is not pair[1]]
        return self._fits(others, [(pair[0].numel + pair[1].numel, codec)])

    def allow_cut(self, trials: Trials, places: Sequence[int], units: Sequence[Unit]) -> bool:
        """Whether these units may take the place of those at the places."""
        if any(unit.option.compresses and self.is_exact(unit) for unit in units):
            return False
        if not self._caps:
            return True
        own = {id(trials.at(place)) for place in places}
        others = [unit for unit in trials.units if id(unit) not in own]
        return self._fits(others, [(unit.numel, unit.codec) for unit in units if unit.option.compresses])

    def allowed_pairs(
        self, trials: Trials, places: tuple[int, int], choices: tuple[Chosen, Chosen]
    ) -> Iterator[tuple[Chosen, Chosen]]:
        """Groups of choices that two units may have at once: any of the first group with any of the second."""
        if not self._caps:
            yield self.allowed(trials, places[0], choices[0]), self.allowed(trials, places[1], choices[1])
            return
        units = [trials.at(place) for place in places]
        others = [other for other in trials.units if all(other is not unit for unit in units)]
        codecs = [(NO_CODEC,) if self.is_exact(unit) else range(NO_CODEC, len(self._caps[0][1])) for unit in units]
        for both in product(*codecs):
            if self._fits(others, [(unit.numel, codec) for unit, codec in zip(units, both, strict=True) if codec != NO_CODEC]):
                yield self._with_codecs(choices[0], (both[0],)), self._with_codecs(choices[1], (both[1],))

    def fit(self, numel: int, choice: int) -> bool:
        """Whether so many elements may have this choice, if all others are uncompressed."""
        codec = int(self._codec_of[choice])
        return codec == NO_CODEC or self._fits((), [(numel, codec)])

    def is_exact(self, unit: Unit) -> bool:
        """Whether the unit holds a tensor that is never compressed."""
        return self.has_exact(unit.start, unit.stop)

    def has_exact(self, start: int, stop: int) -> bool:
        """Whether any of the tensors `start` to `stop` - 1 is never compressed."""
        return self._exact_before[stop] > self._exact_before[start]

    def _fits(self, others: Sequence[Unit], more: Sequence[tuple[int, int]]) -> bool:
        """Whether other units and so many elements with such codecs keep to all caps."""
        used = [(unit.numel, unit.codec) for unit in others if unit.option.compresses]
        return all(sum(numel * each[codec] for numel, codec in (*used, *more)) <= cap for cap, each in self._caps)

    def _with_codecs(self, choices: Chosen, codecs: tuple[int, ...]) -> Chosen:
        key = choices.tobytes(), codecs
        if key not in self._subsets:
            self._subsets[key] = choices[np.isin(self._codec_of[choices], codecs)]
        return self._subsets[key]

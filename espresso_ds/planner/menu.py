"""The menu: every choice that a unit has, an option and, where it compresses, a codec, and what they take at any size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple
from weakref import finalize

import numpy as np
from numpy.typing import NDArray

from ..core.option import Device, Level, Option, Task
from .cost import LINKS, Costs, Operation, Shape, Walk, operations
from .curves import Curve
from .native import library

STEPS = 12  # most actions of an option
RESPECTS = 6
NO_CODEC = -1
GRID = tuple(2**power for power in range(8, 33, 6))
"""Sizes at which choices are compared before any size is known."""
TOLERANCE = 1e-3
"""A choice that is at most this much better in some respect is not better."""


class Choice(NamedTuple):
    """An option, and the codec it compresses with: an index into the compressor profile's codecs."""

    option: Option
    codec: int = 0


Chosen = NDArray[np.int32]
"""Places of choices in a menu."""


class Catalogue:
    """Choices and the operations they are made of, which depend on the shape of the cluster but on nothing measured."""

    def __init__(self, choices: Sequence[Choice], shape: Shape) -> None:
        self.choices, self.shape = tuple(choices), shape
        self.place = {choice: place for place, choice in enumerate(self.choices)}
        self.everything: Chosen = np.arange(len(self.choices), dtype=np.int32)
        found: dict[Operation, int] = {}
        self.steps = np.full((len(self.choices), STEPS), -1, dtype=np.int16)
        self.counts = np.zeros(len(self.choices), dtype=np.int8)
        for row, choice in enumerate(self.choices):
            done = operations(choice.option, choice.codec, shape)
            self.counts[row] = len(done)
            self.steps[row, : len(done)] = [found.setdefault(op, len(found)) for op in done]
        self.operations = tuple(found)
        self.uncompressed = self.select(lambda choice: not choice.option.compresses)
        own = self.select(lambda choice: all(action.at is not Device.CPU for action in choice.option.actions))
        self.on_device = own if len(own) > len(self.uncompressed) else self.everything
        self.codec = np.array([c.codec if c.option.compresses else NO_CODEC for c in self.choices], dtype=np.int32)

    def select(self, condition: Callable[[Choice], bool]) -> Chosen:
        """The choices that fulfil a condition."""
        return np.array([place for place, choice in enumerate(self.choices) if condition(choice)], dtype=np.int32)


class Menu:
    """Choices with what they cost. A choice is an index into `choices`.

    Attributes:
        choices: the options, with codecs.
        uncompressed: the choices that compress nothing.
        on_device: E's C_gpu, the choices that compress on the tensor's own device only; all where there is but one device.
        codec: of each choice; NO_CODEC where it compresses nothing.
    """

    def __init__(self, choices: Sequence[Choice] | Catalogue, costs: Costs) -> None:
        """Look up what the choices' operations cost. Raises FileError (a routine or device was not measured)."""
        catalogue = choices if isinstance(choices, Catalogue) else Catalogue(choices, costs.shape)
        self.catalogue, self.costs = catalogue, costs
        self.choices, self.place, self.operations = catalogue.choices, catalogue.place, catalogue.operations
        self.everything, self.uncompressed, self.on_device = catalogue.everything, catalogue.uncompressed, catalogue.on_device
        self.steps, self.counts, self.codec = catalogue.steps, catalogue.counts, catalogue.codec
        for op in self.operations:
            costs.curves(op)  # raises now what was not measured
        self._fronts: dict[int, Chosen] = {}

    def walk(self, choice: int, numel: int) -> Walk:
        """Steps and bytes of a choice for a unit of `numel` elements."""
        return self.costs.walk(self.choices[choice].option, numel, self.choices[choice].codec)

    def front(self, numel: int, among: Chosen | None = None) -> Chosen:
        """The choices worth trying for a unit of `numel` elements: those that no other one of its codec beats in every respect.

        The respects are the work on each resource, before the first routine, and after the last one. This is no proof (with
        resources that serve whoever comes first, less work can make the whole longer): what it costs is measured in
        benchmarks/planner.
        """
        if among is not None:
            return self._front(numel, among)
        if numel not in self._fronts:
            self._fronts[numel] = self._front(numel, self._useful)
        return self._fronts[numel]

    @cached_property
    def losses(self) -> NDArray[np.float64]:
        """What an element loses by each choice: the relative error of its codec, 0 where nothing is compressed."""
        errors = [codec.relative_error for codec in self.costs.codecs]
        return np.array([errors[c.codec] if c.option.compresses else 0.0 for c in self.choices])

    @cached_property
    def _useful(self) -> Chosen:
        """What is on the front of any size of GRID: a few hundred of the tree's thousands, so that other sizes are quick."""
        return np.unique(np.concatenate([self._front(numel, self.everything) for numel in GRID]))

    def _front(self, numel: int, among: Chosen) -> Chosen:
        """The fronts of the uncompressed choices and of each codec's: what loses less, or nothing, may have to do."""
        codecs = self.codec[among]
        return np.concatenate([self._fastest(numel, among[codecs == codec]) for codec in range(-1, len(self.costs.codecs))])

    def _fastest(self, numel: int, among: Chosen) -> Chosen:
        native = library()
        if native is None:
            return self._python_front(numel, among)
        front = np.empty(len(among), dtype=np.int32)
        count = native.espresso_menu_front(self.native, numel, len(among), among.ctypes.data, TOLERANCE, front.ctypes.data)
        return front[:count].copy()

    def _python_front(self, numel: int, among: Chosen) -> Chosen:
        weights = self.weigh(numel, among)
        kept: list[int] = []
        for row in np.lexsort((among, weights.sum(axis=1))).tolist():
            if not kept or not (weights[kept] <= weights[row] * (1 + TOLERANCE)).all(axis=1).any():
                kept.append(row)
        return among[kept]

    def weigh(self, numel: int, choices: Chosen) -> NDArray[np.float64]:
        """Seconds of work for a unit of `numel` elements, shape (choices, 6).

        On each of the four resources, before the first routine, and after the last one.
        """
        weights = np.zeros((len(choices), RESPECTS))
        native = library()
        if native is not None:
            native.espresso_menu_weigh(self.native, numel, len(choices), choices.ctypes.data, weights.ctypes.data)
            return weights
        for row, choice in zip(weights, choices.tolist(), strict=True):
            steps = self.walk(choice, numel).steps
            links = [place for place, step in enumerate(steps) if step.resource in LINKS]
            for place, step in enumerate(steps):
                row[step.resource] += step.seconds
                row[4] += step.seconds * (place < links[0])
                row[5] += step.seconds * (place > links[-1])
        return weights

    @cached_property
    def native(self) -> int:
        """Handle of the native copy."""
        curves: dict[int, int] = {}
        kept: list[Curve] = []

        def index(curve: Curve) -> int:
            if id(curve) not in curves:
                curves[id(curve)] = len(kept)
                kept.append(curve)
            return curves[id(curve)]

        costs = self.costs
        fields = []
        for op in self.operations:
            seconds, payload = costs.curves(op)
            padded = 1
            if op.task is Task.REDUCE_SCATTER and isinstance(op.action.at, Level):
                padded = costs.shape.ranks(op.action.at)
            kind = index(payload) if payload is not None else -1 if isinstance(op.action.at, Level) else -2
            fields.append((costs.resource(op), index(seconds), kind, op.rows, op.divisor, padded))
        points = np.array([len(curve.x) for curve in kept], dtype=np.int32)
        x, y = (np.concatenate([np.asarray(getattr(curve, axis), dtype=float) for curve in kept]) for axis in "xy")
        slopes = np.array([curve.slope for curve in kept])
        table = np.array(fields, dtype=np.int32)
        native = library()
        assert native is not None
        handle = native.espresso_menu_new(
            costs.element_bytes,
            len(kept),
            points.ctypes.data,
            x.ctypes.data,
            y.ctypes.data,
            slopes.ctypes.data,
            len(fields),
            table.ctypes.data,
            len(self.choices),
            self.steps.ctypes.data,
            self.counts.ctypes.data,
        )
        finalize(self, native.espresso_menu_free, handle)
        return handle

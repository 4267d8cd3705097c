"""What every class of actions took in a run, beside what was predicted of it: the samples that corrections are fitted to."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from ..core.option import Device
from ..core.run_trace import Mark, RunStep, RunTrace
from .cost import Resource, operations
from .measured import backward_of
from .refit_compute import Compute
from .refit_costs import Line, Sample, fit
from .refit_profiles import CodecKey, Model, RoutineKey, link_of
from .refit_runs import Evidence
from .refit_work import Served

ROUTINE_USUAL = 0.15
"""How far the routines of one link usually are from each other, as a logarithm, once the link itself is corrected."""


class Samples:
    """What every class of actions took in the run: unit by unit, step by step."""

    def __init__(self, found: Evidence, work: list[list[list[Served]]], model: Model, compute: Compute) -> None:
        """Gather them; `work` is what was served, by rank and step. Codec work is freed of what backward cost it."""
        self._costs, self._pieces, seconds = model.costs, model.pieces(), model.seconds()
        self._ops = [operations(piece.option, piece.codec, model.costs.shape) for piece in self._pieces]
        self._unit_of = [unit.unit for unit in found.run.units]
        steps = [
            [self._free(run, run.steps[number], of_rank[number], compute) for run, of_rank in zip(found.runs, work, strict=True)]
            for number in range(len(found.run.steps))
        ]
        self.codecs: dict[CodecKey, list[Sample]] = {}
        self.routines: dict[RoutineKey, list[Sample]] = {}
        for actions in self._by_unit_and_operation().values():
            of_steps = [self._one(actions, ranks) for ranks in steps]
            measured = tuple(taken for taken in of_steps if taken is not None)
            if not measured:
                continue
            place, action = actions[0]
            op = self._ops[place][action]
            calls = sum(max(1, op.rows) if isinstance(op.action.at, Device) else 1 for _ in actions)
            sample = Sample(calls, sum(seconds[place][action] for place, action in actions), measured)
            if isinstance(op.action.at, Device):
                self.codecs.setdefault((op.codec, op.action.at, op.task), []).append(sample)
            else:
                self.routines.setdefault((op.task, str(op.action.at), op.groups), []).append(sample)

    def links(self) -> dict[Resource, list[Sample]]:
        """Samples of all routines of each link."""
        found: dict[Resource, list[Sample]] = {}
        for (_, level, _), samples in self.routines.items():
            found.setdefault(link_of(level, self._costs.shape.nodes), []).extend(samples)
        return found

    def routines_beside(self, links: Mapping[Resource, Line]) -> dict[tuple[Resource, RoutineKey], Line]:
        """What of each routine its link's line does not explain, as a factor."""
        found = {}
        for key, samples in self.routines.items():
            link = link_of(key[1], self._costs.shape.nodes)
            rest = [Sample(s.calls, links[link](s.predicted_s, s.calls), s.measured_s) for s in samples]
            found[link, key] = fit(rest, ROUTINE_USUAL, offset=False)
        return found

    def _by_unit_and_operation(self) -> dict[tuple[int, int], list[tuple[int, int]]]:
        """For each unit of the plan and each action of its option, where it is: (piece, action) of every chunk."""
        found: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for place, ops in enumerate(self._ops):
            for action in range(len(ops)):
                found.setdefault((self._unit_of[place], action), []).append((place, action))
        return found

    def _free(
        self, run: RunTrace, step: RunStep, work: Sequence[Served], compute: Compute
    ) -> dict[tuple[int, int], tuple[float, bool]]:
        """Seconds of each (piece, action) of a step with its copies, had no backward been in its way; whether all was seen."""
        backward, end = backward_of(step), step.whole(Mark.FLUSH).start_s
        start = 0.0 if backward is None else backward.start_s
        found: dict[tuple[int, int], tuple[float, bool]] = {}
        for piece in work:
            last = len(self._ops[piece.unit]) - 1
            action = {Mark.COPY_IN: 0, Mark.COPY_OUT: last}.get(Mark(piece.action), 0) if piece.action < 0 else piece.action
            seconds = piece.seconds
            if piece.resource is Resource.CPU:
                beside = max(0.0, min(piece.end_s, end) - max(piece.start_s, start))
                seconds -= beside * (1 - 1 / (1 + compute.contention))
            known, seen = found.get((piece.unit, action), (0.0, True))
            found[piece.unit, action] = known + seconds, seen and not piece.hidden
        return found

    def _one(
        self, actions: Sequence[tuple[int, int]], ranks: Sequence[Mapping[tuple[int, int], tuple[float, bool]]]
    ) -> float | None:
        """Seconds of one unit's action in one step: the mean of codecs, the least of routines; None where that was not seen."""
        whole = []
        for rank in ranks:
            parts = [rank.get(where) for where in actions]
            seen = [part[0] for part in parts if part is not None and part[1]]
            if len(seen) == len(parts):
                whole.append(sum(seen))
        if not whole:
            return None
        place, action = actions[0]
        return statistics.fmean(whole) if isinstance(self._ops[place][action].action.at, Device) else min(whole)

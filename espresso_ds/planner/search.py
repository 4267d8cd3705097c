"""The whole decision: which tensors share a buffer, and which choice each buffer gets.

Fusing changes what compression is worth and compression changes what fusing is worth, so that neither can simply go first.
Algorithm 1 on single tensors pays a latency for every small one, and choices that differ between neighbours keep them from being
fused. Fusing first, on the slow uncompressed timeline, makes buffers so large that, once compressed, they can no longer hide
under the backward. Hence a few starts, each improved and fused in turn, of which the one with the least F(S) is kept and improved
again until it gains no more:

    published  every tensor by itself: Algorithms 1 and 2, so that the plan is never worse than theirs
    uniform    tensors gathered up to a size, for each of fuse.BUCKETS, all with one of the UNIFORM choices that load the busiest
               resource least; the best few of these

All is deterministic; of equal plans the first is kept.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, chain

import numpy as np

from ..core.profile import ModelTrace
from .anneal import anneal
from .bound import Bound, lower_bound
from .chunk import cut_into_chunks
from .cost import Resource
from .decide import algorithm_1
from .fuse import Cut, fuse, partitions, singles
from .improve import descend, drop_idle, exchange, exchange_three, kick, polish
from .limits import Limits
from .menu import Chosen, Menu
from .offload import algorithm_2
from .player import player
from .quick_bounds import last_bound_s, singles_bound_s
from .recut import recut
from .timeline import Unit
from .trials import ROUNDING, Trials

UNIFORM = 4
"""Choices that are tried for all units at once, besides the uncompressed ones."""
STARTS = 6
"""Uniform plans that are improved."""
FEW, KICKS, RANDOM, MOST_RANDOM = 400, 1600, 2400, 100
"""A model of n tensors gets FEW / n^2 starts if that is more, KICKS / n^2 kicks, and RANDOM / n^2 random starts, but at most
MOST_RANDOM: cheap there, and there greed fails most."""
A_FEW = 16
"""Tensors beyond which all that is left out."""

ENOUGH = 1e-4
"""A plan that is at most so much slower than a bound of all plans needs no better one."""
WIDE = 0.05
"""A certified gap from which a longer search is worth its time."""
MORE_STARTS, SEEDS, ROUNDS = 24, 3, 1000
"""What the longer search does: uniform plans improved, then plans annealed, for so many rounds each."""
LARGE = 500
"""From so many tensors on, Algorithms 1 and 2, whose time grows with the square, run only if it is not proven that they lose."""

Progress = Callable[[str, int, int], None]


def published(trace: ModelTrace, menu: Menu, limits: Limits) -> Trials:
    """E's strategy: Algorithm 1 over the options on the tensor's own device, then Algorithm 2; every tensor by itself."""
    units = singles(trace, menu.choices[_plain(trace, menu)])
    return algorithm_2(algorithm_1(units, menu.on_device, trace, menu, limits), menu)


def best_plan(
    trace: ModelTrace,
    menu: Menu,
    limits: Limits | None = None,
    progress: Progress = lambda stage, done, total: None,
    fused: bool = True,
    thorough: bool = False,
) -> list[Unit]:
    """The fastest plan found; never slower than `published`.

    Args:
        trace: tensors in the order of the wire.
        menu: the choices for every unit.
        limits: what the plan must keep to.
        progress: called with (what is tried, starts done, all starts).
        fused: whether tensors may share a buffer and buffers travel in chunks.
        thorough: from more starts, and with units cut in other ways, which takes some ten times as long.
    """
    limits = limits or Limits(trace, menu)
    enough_s = last_bound_s(trace, menu) * (1 + ENOUGH)
    every = [(index, index + 1) for index in range(len(trace.tensors))]
    large = len(every) > LARGE
    found = [] if large else [published(trace, menu, limits)]
    if large or found[0].time > enough_s:
        cuts = partitions(trace, limits.exact) if fused else [[every]]
        starts = uniform_plans(cuts, trace, menu, limits, MORE_STARTS if thorough else STARTS)
        starts += random_plans(cuts, trace, menu, limits, min(MOST_RANDOM, _few(trace, RANDOM)))
        for done, trials in enumerate(starts):
            progress(f"planning in {len(trials.units)} units", done, len(starts))
            found.append(_improve(trials, menu, limits, fused))
            if found[-1].time <= enough_s:
                break
    if large and singles_bound_s(trace, menu) < min(trials.time for trials in found):
        progress("planning every tensor by itself", 1, 1)
        found.append(published(trace, menu, limits))
    best = min(found, key=lambda trials: trials.time)
    if best.time <= enough_s:
        if fused:
            fuse(best, limits)
            return cut_into_chunks(best.units, trace, menu, limits)
        return best.units
    different = {round(trials.time, 12): trials for trials in found}
    few = sorted(different)[: max(1, _few(trace, FEW))]
    best = min((_improve_deeply(different[time], trace, menu, limits, fused, thorough) for time in few), key=lambda t: t.time)
    while kick(best, menu, limits, _few(trace, KICKS)):
        exchange(best, menu, limits)
    return cut_into_chunks(best.units, trace, menu, limits) if fused else best.units


def certified_plan(
    trace: ModelTrace, menu: Menu, limits: Limits, progress: Progress = lambda stage, done, total: None
) -> tuple[list[Unit], Bound]:
    """The fastest plan found and a lower bound of all plans; where they are more than WIDE apart, after a longer search.

    Args:
        trace: tensors in the order of the wire.
        menu: the choices for every unit.
        limits: what the plan must keep to.
        progress: called with (what is tried, steps done, all steps).
    """
    units = best_plan(trace, menu, limits, progress)
    planned_s = Trials(units, trace, menu).time
    bound = lower_bound(trace, menu, planned_s, limits.exact)
    if planned_s <= bound.seconds * (1 + WIDE) or len(trace.tensors) > LARGE:
        return units, bound
    found = [units, best_plan(trace, menu, limits, progress, thorough=True)]
    for seed in range(SEEDS):
        progress("annealing", seed, SEEDS)
        least = min(found, key=lambda units: Trials(units, trace, menu).time)
        found.append(cut_into_chunks(anneal(least, trace, menu, limits, ROUNDS, seed), trace, menu, limits))
    units = min(found, key=lambda units: Trials(units, trace, menu).time)
    return units, lower_bound(trace, menu, Trials(units, trace, menu).time, limits.exact)


def _few(trace: ModelTrace, most: int) -> int:
    """How much to try of what is only worth it for a few tensors."""
    return most // len(trace.tensors) ** 2 if len(trace.tensors) <= A_FEW else 0


def best_uncompressed(trace: ModelTrace, menu: Menu) -> list[Unit]:
    """The fastest plan found that compresses nothing, overlapped with backward and fused."""
    limits = Limits(trace, menu, exact=range(len(trace.tensors)))
    starts = [Trials(singles(trace, menu.choices[_plain(trace, menu)]), trace, menu)]
    starts += uniform_plans(partitions(trace, limits.exact), trace, menu, limits, STARTS)
    found = [_improve(trials, menu, limits, True) for trials in starts]
    return min(found, key=lambda trials: trials.time).units


def _improve(trials: Trials, menu: Menu, limits: Limits, fused: bool) -> Trials:
    descend(trials, menu, limits)
    drop_idle(trials, menu)
    if fused:
        fuse(trials, limits)
    return trials


def _improve_deeply(trials: Trials, trace: ModelTrace, menu: Menu, limits: Limits, fused: bool, cuts: bool) -> Trials:
    before = float("inf")
    while trials.time < before * (1 - ROUNDING):
        before = trials.time
        if fused and cuts:
            movable = Trials(trials.units, trace, menu, movable=True)
            recut(movable, trace, menu, limits)
            trials = movable.copy()
        trials = _improve(trials.copy(), menu, limits, fused).copy()
        polish(trials, menu, limits)
        exchange(trials, menu, limits)
        exchange_three(trials, menu, limits)
    return trials


def uniform_plans(cuts: Sequence[Sequence[Cut]], trace: ModelTrace, menu: Menu, limits: Limits, count: int) -> list[Trials]:
    """The fastest plans that cut the trace in one of these ways and give one choice to all units that may have it.

    First the best of each group of cuts, then the second best of each, and so on: `count` plans, and more for a few tensors.
    Plans of groups that are far apart end in different local optima.
    """
    most = max(count, _few(trace, FEW))
    choices = least_loaded(trace, menu, max(UNIFORM, most // len(cuts)))
    numel_before = list(accumulate((tensor.numel for tensor in trace.tensors), initial=0))
    plans: list[tuple[int, float, int, Cut]] = []
    for group in cuts:
        times = [
            (time, choice, cut)
            for cut in group
            for choice, time in _uniform_times(
                cut, [numel_before[b] - numel_before[a] for a, b in cut], choices, trace, menu, limits
            )
        ]
        plans += [(rank, *plan) for rank, plan in enumerate(sorted(times))]
    starts = []
    for _, _, choice, cut in sorted(plans)[:most]:
        trials = Trials(_units(cut, choices[0], trace, menu), trace, menu)
        trials.replace_all([(place, choice) for place in trials.places if not limits.is_exact(trials.at(place))])
        starts.append(trials)
    return starts


def _uniform_times(
    cut: Cut, numels: Sequence[int], choices: Sequence[int], trace: ModelTrace, menu: Menu, limits: Limits
) -> Iterator[tuple[int, float]]:
    """Choices, and when synchronisation ends with them for all units that may have them; the others have the first choice."""
    plain, *others = choices
    played = player([trace.tensors[stop - 1].ready_s for _, stop in cut], trace.backward_s, menu)
    for place, numel in enumerate(numels):
        played.set(place, numel, plain)
    yield plain, played.end()
    free = [(place, numel) for place, (run, numel) in enumerate(zip(cut, numels, strict=True)) if not limits.has_exact(*run)]
    for choice in others:
        if limits.fit(sum(numel for _, numel in free), choice) and free:
            yield choice, played.attempt([(place, numel, choice) for place, numel in free])


def random_plans(cuts: Sequence[Sequence[Cut]], trace: ModelTrace, menu: Menu, limits: Limits, count: int) -> list[Trials]:
    """Plans with random cuts and random choices of the fronts; the same ones every time."""
    rng = random.Random(0)
    plans = []
    for _ in range(count):
        trials = Trials(_units(rng.choice(rng.choice(cuts)), int(menu.uncompressed[0]), trace, menu), trace, menu)
        for place in trials.places:
            trials.replace(place, int(rng.choice(limits.allowed(trials, place, menu.front(trials.at(place).numel)))))
        plans.append(trials)
    return plans


def _units(cut: Cut, choice: int, trace: ModelTrace, menu: Menu) -> list[Unit]:
    return [Unit.of(trace, start, stop, *menu.choices[choice]) for start, stop in cut]


def least_loaded(trace: ModelTrace, menu: Menu, most: int) -> list[int]:
    """The choices that, given to the whole model as one buffer, load the busiest resource least.

    Two uncompressed ones first, then `most` with each codec.
    """
    numel = sum(tensor.numel for tensor in trace.tensors)

    def ranked(choices: Chosen) -> list[int]:
        load = menu.weigh(numel, choices)[:, : len(Resource)] + [trace.backward_s, 0.0, 0.0, 0.0]
        return choices[np.argsort(load.max(axis=1), kind="stable")].tolist()

    front = menu.front(numel)
    lossy = [ranked(front[menu.codec[front] == codec])[:most] for codec in range(len(menu.costs.codecs))]
    return [*ranked(menu.uncompressed)[:2], *chain.from_iterable(lossy)]


def _plain(trace: ModelTrace, menu: Menu) -> int:
    """The uncompressed choice that is best for all tensors at once, each by itself."""
    choices = menu.uncompressed.tolist()
    trials = Trials(singles(trace, menu.choices[choices[0]]), trace, menu)
    return min(choices, key=lambda choice: trials.time_with_all([(place, choice) for place in trials.places]))

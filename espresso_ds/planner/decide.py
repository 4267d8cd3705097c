"""Which option for which unit: the paper's greedy Algorithm 1 over the whole timeline (E 4.4).

1. Take the units in descending order of size (Property 2).
2. Skip a unit that is done before a bubble: to send it faster gains nothing (Property 1). The bubbles are those of the plan so
   far, so that they are looked at again after every change.
3. Otherwise try every option and keep the one with the least F(S), the step time of the whole timeline (Property 3).

Among equal sizes the paper's text takes the tensor closer to the output layer first, the one that is ready earlier; its figure 9
compresses the later one. The timeline supports the figure, and so does this code: what the earlier tensor saves is partly lost in
a bubble before the later one is ready, and its compression holds the link up, while the later one is compressed under the earlier
one's communication. On 300 random instances of three equal tensors (2 to 8 ranks, one device) later first found the best of all
plans in 94%, earlier first in 87%; where they differed, later first was better 36 times and worse 10 times.

Deviations: where a busy link slows the backward (`Costs.link_contention`), Property 1 does not hold, since to send a hidden unit
faster leaves more of the cores to the backward; no unit is skipped then. A unit that is compressed already, in a plan given to
`decide`, is looked at even before a bubble, since to compress it less may spare the backward the codec's work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ..core.option import UNCOMPRESSED, Option
from ..core.profile import ModelTrace
from .cost import Costs
from .timeline import Timeline, Unit, simulate, step_time

ROUNDING = 1e-9
"""Share of the step time below which two predictions are the same."""


def beyond_gain(timeline: Timeline, costs: Costs) -> frozenset[int]:
    """Units that Property 1 rules out."""
    return timeline.hidden if costs.link_contention == 0.0 else frozenset()


Progress = Callable[[int, int], None]


class Trials:
    """A plan under change, and what it would take with one unit's option replaced.

    A trial that provably cannot come below a given time is not simulated. Whatever resource R a unit i needs, none of that work
    can start before the unit is ready, nor the work of the units behind it before they are, so

        F(S) >= forward + max_i (ready_i + sum over j >= i of the seconds on R of unit j) + after

    and likewise with all the steps of one unit. With a prefix and a suffix maximum for each R, the bound for one replaced unit
    takes constant time. (Options are not dropped beforehand for being slower in every step: with resources that serve whoever
    comes first, a shorter step can make the whole longer, so that there is no proof.)
    """

    def __init__(self, units: Sequence[Unit], trace: ModelTrace, costs: Costs) -> None:
        """Start from `units` in plan order. Raises FileError (a cost was not measured)."""
        self.units = list(units)
        self._trace, self._costs = trace, costs
        self._ready = [unit.ready_s for unit in units]
        self._walks = [costs.walk(unit.option, unit.numel).lean for unit in units]
        self._measure()

    def replace(self, index: int, option: Option) -> None:
        """Give the unit another option for good. Raises FileError."""
        self.units[index] = replace(self.units[index], option=option)
        self._walks[index] = self._costs.walk(option, self.units[index].numel).lean
        self._measure()

    def time_with(self, index: int, option: Option) -> float:
        """F(S) in seconds with the unit's option replaced. Raises FileError."""
        kept = self._walks[index]
        self._walks[index] = self._costs.walk(option, self.units[index].numel).lean
        time = step_time(self._walks, self._ready, self._trace, self._costs)
        self._walks[index] = kept
        return time

    def floor(self, index: int, option: Option) -> float:
        """A lower bound of `time_with`, in constant time."""
        walk = self._costs.walk(option, self.units[index].numel).lean
        load = _loads(walk)
        end = max(self._trace.backward_s, self._ready[index] + sum(load))
        for resource in (0, 1, 2):
            more = load[resource] - self._load[index][resource]
            end = max(end, self._upto[resource][index] + more, self._beyond[resource][index])
        return self._trace.forward_s + end + self._trace.after_s

    def best(self, index: int, options: Sequence[Option], below: float) -> tuple[float, Option | None]:
        """The option with the least F(S) if that is under `below`, else (below, None). Ties go to the first of `options`."""
        least, found = below, None
        ranked = sorted((self.floor(index, option), place, option) for place, option in enumerate(options))
        winner = len(options)
        for floor, place, option in ranked:
            if floor > least:
                break
            time = self.time_with(index, option)
            if time < least or (time == least and place < winner and found is not None):
                least, winner, found = time, place, option
        return least, found

    def _measure(self) -> None:
        self._load = [_loads(walk) for walk in self._walks]
        self.time = step_time(self._walks, self._ready, self._trace, self._costs)
        count = len(self.units)
        self._upto, self._beyond = [], []
        for resource in (0, 1, 2):
            behind, work = [0.0] * (count + 1), 0.0
            for index in range(count - 1, -1, -1):
                work += self._load[index][resource]
                behind[index] = self._ready[index] + work
            upto, beyond = [0.0] * count, [0.0] * count
            for index in range(count):
                upto[index] = max(behind[index], upto[index - 1] if index else 0.0)
            for index in range(count - 2, -1, -1):
                beyond[index] = max(behind[index + 1], beyond[index + 1])
            self._upto.append(upto)
            self._beyond.append(beyond)


def decide(
    units: Sequence[Unit],
    options: Sequence[Option],
    trace: ModelTrace,
    costs: Costs,
    progress: Progress = lambda done, total: None,
) -> list[Unit]:
    """Algorithm 1: the units with the options that the greedy search gives them.

    Args:
        units: in plan order, with the options to start from (the paper starts from uncompressed allreduce).
        options: candidates for every unit.
        trace: gradient ready times.
        costs: what actions cost.
        progress: called with (units looked at, all units).

    Returns:
        The same units, some with other options; their F(S) is never above that of `units`.

    Raises:
        FileError: a cost was not measured.
    """
    trials = Trials(units, trace, costs)
    hidden = beyond_gain(simulate(trials.units, trace, costs), costs)
    for done, index in enumerate(order_of_size(units)):
        progress(done, len(units))
        current = trials.units[index].option
        if index in hidden and not current.compresses:
            continue
        others = [option for option in options if option != current]
        _, option = trials.best(index, others, below=trials.time * (1 - ROUNDING))
        if option is not None:
            trials.replace(index, option)
            hidden = beyond_gain(simulate(trials.units, trace, costs), costs)
    return trials.units


def order_of_size(units: Sequence[Unit]) -> list[int]:
    """Places of the units in descending order of size, among equal sizes the later in backward first (see above)."""
    return sorted(range(len(units)), key=lambda index: (-units[index].numel, -index))


def drop_idle(units: Sequence[Unit], trace: ModelTrace, costs: Costs) -> list[Unit]:
    """Send units uncompressed again whose compression no longer saves time, smallest first.

    Not in the paper: a choice made early can lose its worth through later ones, and compression that saves nothing only costs
    accuracy. F(S) does not rise. Raises FileError.
    """
    trials = Trials(units, trace, costs)
    for index in reversed(order_of_size(units)):
        if not trials.units[index].option.compresses:
            continue
        limit = trials.time * (1 + ROUNDING)
        if trials.floor(index, UNCOMPRESSED) <= limit and trials.time_with(index, UNCOMPRESSED) <= limit:
            trials.replace(index, UNCOMPRESSED)
    return trials.units


def spare(units: Sequence[Unit], trace: ModelTrace, costs: Costs, limit_s: float) -> list[Unit]:
    """Send units uncompressed again while F(S) stays below `limit_s`: first those that are large for what compression saves.

    Not in the paper: time that nobody notices is given for fewer lossy tensors. Raises FileError.
    """
    trials = Trials(units, trace, costs)
    compressed = [index for index, unit in enumerate(units) if unit.option.compresses]
    price = {index: (trials.time_with(index, UNCOMPRESSED) - trials.time) / units[index].numel for index in compressed}
    for index in sorted(compressed, key=price.__getitem__):
        if trials.time_with(index, UNCOMPRESSED) <= limit_s:
            trials.replace(index, UNCOMPRESSED)
    return trials.units


def _loads(walk: Sequence[tuple[int, float]]) -> list[float]:
    """Seconds of the walk on each resource."""
    load = [0.0, 0.0, 0.0]
    for resource, seconds in walk:
        load[resource] += seconds
    return load

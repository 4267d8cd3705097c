"""Never slower: the first steps of a run are sent by turns as planned and uncompressed, and what does not pay is dropped.

A *way* is how a step's gradients are sent. Which one comes next, and which one stays, is a function of the times of the steps so
far (`next_way`, `verdict`). Every rank gets the same times, those of the slowest one, so all switch at the same step.

A step's time has two parts. From the start of backward until the gradients are synchronised it depends on the way. All else (the
optimizer, the data, the forward pass; now and then an evaluation or a checkpoint) does not: its median over all steps counts for
every way alike, so that what happens between steps can speak for none of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

MARGIN = 0.02
"""Share of the step by which another way has to be faster than the one it replaces."""
WARM_UP = 2
"""First planned steps, which don't count: memory is taken, kernels are compiled, pages are touched."""
PLANNED_FIRST = 2
"""Planned steps that count before the first uncompressed one."""
MOST_UNCOMPRESSED = 4
"""Uncompressed steps before the verdict on the plan; on a slow link each costs many planned ones."""
MOST_MIXED = 3
"""Steps of the mixture before the verdict on it."""
PREDICTED_CLEARLY = 1.2
"""By this factor the plan has to be predicted faster than sending uncompressed, ..."""
OBVIOUS = 1.5
"""... and by this one it has to be seen faster, for one uncompressed step to do; then no mixture is tried either."""
HOLDS_LONGER = 1.25
"""By this factor a unit has to hold the others up longer compressed than uncompressed to be sent uncompressed in the mixture."""


class Way(Enum):
    """How a step's gradients are sent."""

    PLANNED = "planned"
    UNCOMPRESSED = "uncompressed"
    MIXED = "mixed"
    """As planned, but for the units that were seen to hold the others up longer compressed than uncompressed."""


class Sample(NamedTuple):
    """One step, in seconds of the slowest rank: `synced_s` from the start of backward until the gradients are synchronised,
    `rest_s` from the end of the step before until then.
    """

    way: Way
    synced_s: float
    rest_s: float


class Figure(NamedTuple):
    """What a step takes on one way: the median over `steps` steps, and how far they are apart."""

    seconds: float
    spread_s: float
    steps: int


@dataclass(frozen=True)
class Outcome:
    """What the guard found: `way` stays, from step `step` on (counted from 0); `figures` says what a step takes on each way that
    was tried; `dropped` has the numbers of the units that are sent uncompressed from then on, of `compressed` that were planned
    to be compressed.
    """

    way: Way
    step: int
    figures: dict[Way, Figure]
    dropped: frozenset[int]
    compressed: int

    def text(self, names: Sequence[str] = ()) -> str:
        """One line for people, with some of the names of the units that were dropped."""
        tried = ", ".join(f"{way.value} {figure.seconds:.3f} s" for way, figure in self.figures.items())
        counts = [str(figure.steps) for figure in self.figures.values()]
        steps = f"{', '.join(counts[:-1])} and {counts[-1]}" if len(counts) > 1 else counts[0]
        some = f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""
        verdict = {
            Way.PLANNED: "the plan stays",
            Way.MIXED: f"{len(self.dropped)} of {self.compressed} compressed units do not pay and are sent uncompressed from "
            f"step {self.step + 1} on{some}",
            Way.UNCOMPRESSED: f"the plan does not pay here and is dropped: all goes uncompressed from step {self.step + 1} on; "
            "`espresso compare` with a run trace shows why, `espresso replan` plans again from it",
        }[self.way]
        return f"guard: {tried} a step (medians of {steps} steps): {verdict}"


def figures(samples: Sequence[Sample]) -> dict[Way, Figure]:
    """What is known of every way that was tried. The warm-up does not count, nor does the first uncompressed step where there are
    others: buffers are touched and connections made in it.
    """
    rest_s = statistics.median(sample.rest_s for sample in (samples[1:] or samples))  # nobody knows when the first step began
    found = {}
    for way in Way:
        times = [sample.synced_s for sample in samples if sample.way is way]
        cold = {Way.PLANNED: WARM_UP, Way.UNCOMPRESSED: 1, Way.MIXED: 0}[way]
        times = times[min(cold, max(len(times) - 1, 0)) :]
        if times:
            found[way] = Figure(rest_s + statistics.median(times), _spread(times), len(times))
    return found


def _spread(times: Sequence[float]) -> float:
    """From the fastest to the slowest of three steps or more but one: what disturbs a single step makes it slower, seldom two."""
    kept = sorted(times)[:-1] if len(times) > 2 else times
    return max(kept) - min(kept)


def beats(new: Figure, old: Figure) -> bool:
    """Whether `new` is faster by more than the margin, and by more than single steps differ by chance: of three to five steps
    each, half of both spreads is about the standard error of the difference of medians.
    """
    return old.seconds - new.seconds > max(MARGIN * old.seconds, (new.spread_s + old.spread_s) / 2)


def _clear(one: Figure, other: Figure) -> bool:
    """Whether more steps could hardly turn the comparison: the gap is wider than both spreads together."""
    gap = abs(one.seconds - other.seconds)
    return min(one.steps, other.steps) > 1 and gap > MARGIN * max(one.seconds, other.seconds) + one.spread_s + other.spread_s


def plan_is_judged(samples: Sequence[Sample], most_steps: int, predicted_gain: float) -> bool:
    """Whether enough is known to choose between the plan and sending everything uncompressed.

    Args:
        samples: of all steps so far.
        most_steps: that may be measured.
        predicted_gain: the predicted step uncompressed over that as planned.
    """
    count = sum(sample.way is Way.UNCOMPRESSED for sample in samples)
    if count == 0:
        return False
    if count >= MOST_UNCOMPRESSED or len(samples) >= most_steps:
        return True
    known = figures(samples)
    planned, uncompressed = known[Way.PLANNED], known[Way.UNCOMPRESSED]
    obvious = predicted_gain > PREDICTED_CLEARLY and uncompressed.seconds > OBVIOUS * planned.seconds
    return obvious if count == 1 else _clear(planned, uncompressed)


def mixture_is_judged(samples: Sequence[Sample], most_steps: int) -> bool:
    """Whether enough is known to choose between the mixture and the better one of the other two ways."""
    count = sum(sample.way is Way.MIXED for sample in samples)
    if count >= MOST_MIXED or len(samples) >= most_steps:
        return True
    return count > 1 and _clear(figures(samples)[Way.MIXED], figures(samples)[better(samples)])


def better(samples: Sequence[Sample]) -> Way:
    """Of the plan and sending everything uncompressed the one that is to be kept: in doubt the plan."""
    known = figures(samples)
    return Way.UNCOMPRESSED if beats(known[Way.UNCOMPRESSED], known[Way.PLANNED]) else Way.PLANNED


def verdict(samples: Sequence[Sample]) -> Way:
    """The way to keep: the mixture only where it beats the better one of the others."""
    known, best = figures(samples), better(samples)
    return Way.MIXED if Way.MIXED in known and beats(known[Way.MIXED], known[best]) else best


def next_way(samples: Sequence[Sample], mixture: bool) -> Way:
    """How to send the next step, while nothing is judged yet: by turns, so that what drifts meets all ways alike.

    Args:
        samples: of all steps so far.
        mixture: whether the plan is judged already, and the mixture is on trial.
    """
    if mixture:
        return better(samples) if samples[-1].way is Way.MIXED else Way.MIXED
    if len(samples) < WARM_UP + PLANNED_FIRST:
        return Way.PLANNED
    return Way.PLANNED if samples[-1].way is Way.UNCOMPRESSED else Way.UNCOMPRESSED


def unpaying(planned_s: Sequence[float], uncompressed_s: Sequence[float], step_s: float) -> frozenset[int]:
    """The units of the mixture: those that hold the others up longer compressed than not, if together that is worth a trial.

    Args:
        planned_s: for how long each unit held up those behind it in planned steps; negative where nobody knows.
        uncompressed_s: the same in uncompressed steps.
        step_s: what a step takes.
    """
    saved = {
        unit: planned - uncompressed
        for unit, (planned, uncompressed) in enumerate(zip(planned_s, uncompressed_s, strict=True))
        if planned > HOLDS_LONGER * uncompressed >= 0
    }
    return frozenset(saved) if sum(saved.values()) > MARGIN * step_s else frozenset()


class Guard:
    """Leads a run through its first steps. `begin` and `end` are called around what a step's synchronisation can slow down.

    Args:
        compressed: numbers of the units that may be sent either way.
        most_steps: that may be measured, warm-up included.
        predicted_gain: the predicted step uncompressed over that as planned.
        largest: the largest of each number over all ranks. Collective.
        holds_s: for how long each unit held up those behind it in the given steps (their median), on this rank; negative where
            that was not recorded.
        finish: returns when the device has done what it was given.
        clock: seconds.
    """

    def __init__(
        self,
        compressed: Set[int],
        most_steps: int,
        predicted_gain: float,
        largest: Callable[[Sequence[float]], list[float]],
        holds_s: Callable[[Set[int]], list[float]],
        finish: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._compressed = frozenset(compressed)
        self._most_steps, self._predicted_gain = most_steps, predicted_gain
        self._largest, self._holds_s, self._finish, self._clock = largest, holds_s, finish, clock
        self._samples: list[Sample] = []
        self._mixture: frozenset[int] | None = None
        self._way = Way.PLANNED
        self._ended_s = clock()
        self._begun_s: float | None = None
        self.outcome: Outcome | None = None

    @property
    def uncompressed(self) -> frozenset[int]:
        """The units to be sent uncompressed in the step to come."""
        return {Way.PLANNED: frozenset[int](), Way.UNCOMPRESSED: self._compressed, Way.MIXED: self._mixture or frozenset()}[
            self._way
        ]

    @property
    def steps_off_plan(self) -> frozenset[int]:
        """The steps so far in which not all was sent as planned."""
        return frozenset(number for number, sample in enumerate(self._samples) if sample.way is not Way.PLANNED)

    @property
    def begun(self) -> bool:
        """Whether the step has begun."""
        return self._begun_s is not None

    def begin(self) -> None:
        """The backward pass starts whose gradients will be synchronised."""
        self._finish()
        self._begun_s = self._clock()

    def end(self) -> Outcome | None:
        """The gradients of the step that was begun are synchronised. Collective. Returns what was found, once it is."""
        assert self._begun_s is not None and self.outcome is None
        self._finish()
        mine = self._clock() - self._begun_s, self._begun_s - self._ended_s
        self._samples.append(Sample(self._way, *self._largest(mine)))
        self._choose()
        self._begun_s, self._ended_s = None, self._clock()
        return self.outcome

    def _choose(self) -> None:
        samples, most_steps = self._samples, self._most_steps
        if self._mixture is None:
            if not plan_is_judged(samples, most_steps, self._predicted_gain):
                self._way = next_way(samples, mixture=False)
                return
            self._mixture = self._find_mixture() if len(samples) < most_steps else frozenset()
        if self._mixture and not mixture_is_judged(samples, most_steps):
            self._way = next_way(samples, mixture=True)
            return
        self._way = verdict(samples)
        self.outcome = Outcome(self._way, len(samples), figures(samples), self.uncompressed, len(self._compressed))

    def _find_mixture(self) -> frozenset[int]:
        """Empty where no unit, or every one, would be sent uncompressed, and where uncompressed steps are so slow that a wrong
        guess would be dear and a right one hardly give anything.
        """
        known = figures(self._samples)
        if known[Way.UNCOMPRESSED].seconds > OBVIOUS * known[Way.PLANNED].seconds:
            return frozenset()
        planned, uncompressed = ([n for n, s in enumerate(self._samples) if s.way is way] for way in list(Way)[:2])
        mine = [*self._holds_s(set(planned[WARM_UP:])), *self._holds_s(set(uncompressed[1:] or uncompressed))]
        holds_s = [-longest for longest in self._largest([-held for held in mine])]  # the shortest: others waited for that rank
        half = len(holds_s) // 2
        found = self._compressed & unpaying(holds_s[:half], holds_s[half:], known[Way.PLANNED].seconds)
        return found if found != self._compressed else frozenset()

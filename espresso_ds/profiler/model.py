"""When gradients become ready: the clockwork around the backward of any model, and its summary as a ModelTrace (E 4.4).

Synchronisation is left out by whoever drives the recorder, so the times are those of computing alone.
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..core.profile import ModelTrace, TracedTensor


@dataclass
class StepTimes:
    """One optimizer step of one rank: seconds; `ready` from the start of backward to the last firing of each gradient hook;
    `after_s` from where ranks met after backward."""

    forward_s: float
    backward_s: float
    after_s: float
    ready: dict[str, float]
    firings: dict[str, int]


@dataclass
class _Marks:
    begun: float
    backward: float = 0.0
    backward_end: float = 0.0
    after: float = 0.0
    ready: dict[str, float] = field(default_factory=dict)
    firings: dict[str, int] = field(default_factory=dict)


class Recorder:
    """Times the steps of a model. Call `backward_begins`, `backward_ends` and `step_ends` around each step that is synchronised.

    Ranks meet before each step (`restart`) and, where there are several, after backward (`goes_on`), as in training.

    Args:
        parameters: name -> trainable parameter.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        self.steps: list[StepTimes] = []
        self._cuda = next(iter(parameters.values())).is_cuda
        self._marks = _Marks(self._now())
        self._recording = False
        self._hooks = [
            p.register_post_accumulate_grad_hook(functools.partial(self._ready, name)) for name, p in parameters.items()
        ]

    def backward_begins(self) -> None:
        """The backward whose gradients are synchronised starts now."""
        self._marks.backward = self._now()
        self._recording = True

    def backward_ends(self) -> None:
        """All gradients are complete; synchronisation would be awaited here."""
        self._marks.backward_end = self._marks.after = self._now()
        self._recording = False

    def goes_on(self) -> None:
        """All ranks' gradients are complete: what follows is timed from here."""
        self._marks.after = self._now()

    def step_ends(self) -> None:
        """The optimizer has stepped. Call `restart` when the next step may begin."""
        marks, now = self._marks, self._now()
        self.steps.append(
            StepTimes(
                marks.backward - marks.begun,
                marks.backward_end - marks.backward,
                now - marks.after,
                {name: at - marks.backward for name, at in marks.ready.items()},
                marks.firings,
            )
        )

    def restart(self) -> None:
        """Start the clock of the next step, after whatever barrier the caller needs."""
        self._marks = _Marks(self._now())

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def _ready(self, name: str, _: torch.nn.Parameter) -> None:
        if self._recording:
            self._marks.ready[name] = self._now()
            self._marks.firings[name] = self._marks.firings.get(name, 0) + 1

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()  # exact ready times at the price of a slower traced run
        return time.perf_counter()


def summarise(
    ranks: Sequence[Sequence[StepTimes]],
    parameters: Mapping[str, torch.nn.Parameter],
    *,
    model: str,
    ranks_per_node: int,
    config: dict[str, str | int | float | bool],
    wire_dtype: str,
) -> ModelTrace:
    """The trace of a run: of each mark of a step the latest over ranks, since all wait for it; then the median over steps.

    Marks count from where ranks met, not from each rank's mark before: where ranks share cores, one that comes late to
    backward is not the one that is slow in it, and the longest of each phase would add up to more than a step takes.

    Args:
        ranks: the measured steps of every rank, equally many.
    """
    steps = list(zip(*ranks, strict=True))

    def over_steps(of_rank: Callable[[StepTimes], float]) -> float:
        return statistics.median(max(of_rank(times) for times in step) for step in steps)

    forward_s = over_steps(lambda times: times.forward_s)
    backward_s = over_steps(lambda times: times.forward_s + times.backward_s) - forward_s
    tensors = [
        TracedTensor(
            name=name,
            shape=tuple(param.shape),
            dtype=str(param.dtype).removeprefix("torch."),
            numel=param.numel(),
            ready_s=min(backward_s, max(0.0, over_steps(functools.partial(_ready_s, name)) - forward_s)),
            firings=max(times.firings.get(name, 1) for step in steps for times in step),
        )
        for name, param in parameters.items()
    ]
    totals = sorted(max(t.forward_s + t.backward_s for t in step) + max(t.after_s for t in step) for step in steps)
    middle = statistics.median(totals)
    spread = (totals[(3 * len(totals)) // 4] - totals[len(totals) // 4]) / middle
    return ModelTrace(
        model=model,
        device="cuda" if next(iter(parameters.values())).is_cuda else "cpu",
        world_size=len(ranks),
        ranks_per_node=ranks_per_node,
        threads=torch.get_num_threads(),
        cores=len(os.sched_getaffinity(0)),
        steps=len(steps),
        config=config,
        wire_dtype=wire_dtype,
        forward_s=forward_s,
        backward_s=backward_s,
        after_s=over_steps(lambda times: times.after_s),
        spread=spread,
        tensors=tuple(sorted(tensors, key=lambda tensor: tensor.ready_s)),
    )


def _ready_s(name: str, times: StepTimes) -> float:
    """When a gradient was complete, from the step's start; one that got none is known to be complete when backward ends."""
    return times.forward_s + times.ready.get(name, times.backward_s)

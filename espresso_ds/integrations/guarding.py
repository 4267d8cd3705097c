"""The never-slower guard (`runtime.guard`) on a run: what it measures, what becomes of its finding, and who hears of it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence, Set

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from ..core.config import GuardSettings
from ..core.errors import FileError
from ..core.plan import Plan
from ..core.run_trace import run_units
from ..runtime import streams
from ..runtime.agree import largest
from ..runtime.guard import Guard, Outcome
from ..runtime.synchroniser import Synchroniser
from ..runtime.trace import Recorder, holds_s

GUARD_ENV = "ESPRESSO_GUARD"


def guard_wanted(settings: GuardSettings) -> bool:
    """Whether the plan is to be measured: by `ESPRESSO_GUARD` (0 or 1), else by the block. Raises FileError at another value."""
    asked = os.environ.get(GUARD_ENV, "")
    if asked not in ("", "0", "1"):
        raise FileError(f"{GUARD_ENV}={asked}: 0 switches the guard off, 1 on; unset, the espresso block decides")
    return asked == "1" if asked else settings.enabled


def tell(text: str) -> None:
    """One line for people, from rank 0."""
    if dist.get_rank() == 0:
        print(f"espresso: {text}", file=sys.stderr, flush=True)


class Guarding:
    """A guard at work; `close` ends it, also before its verdict.

    Args:
        settings: how long it may take.
        plan: what it judges.
        synchroniser: sends as the guard says.
        recorder: of the synchroniser.
        control: a group of all ranks for a few numbers a step; given back with the verdict.
        timeout_s: deadline of waiting for other ranks.
        device: where the model computes.
    """

    def __init__(
        self,
        settings: GuardSettings,
        plan: Plan,
        synchroniser: Synchroniser,
        recorder: Recorder,
        control: ProcessGroup,
        timeout_s: float,
        device: torch.device,
    ) -> None:
        self._synchroniser, self._recorder, self._units = synchroniser, recorder, run_units(plan)
        self._control: ProcessGroup | None = control
        self._timeout_s, self._device = timeout_s, device
        gain = plan.predicted.uncompressed_s / max(plan.predicted.planned_s, sys.float_info.min)
        self.guard = Guard(synchroniser.may_be_plain, settings.steps, gain, self._largest, self._holds_s, self._finish)

    @property
    def outcome(self) -> Outcome | None:
        """What was found; None before."""
        return self.guard.outcome

    def begin(self) -> None:
        """The backward pass starts whose gradients will be synchronised."""
        if self.outcome is None:
            self.guard.begin()

    def flush(self) -> None:
        """Synchronise what is left of the step, then let the guard say how the next one is sent."""
        if self.outcome is not None:
            self._synchroniser.flush()
            return
        if not self.guard.begun:  # the engine has not been told of a boundary before
            self.guard.begin()
        self._synchroniser.flush()
        outcome = self.guard.end()
        if outcome is None:
            self._synchroniser.send_plain(self.guard.uncompressed)
            return
        self._synchroniser.settle_on(outcome.dropped)
        if outcome.dropped:
            self._recorder.stop()  # the run trace is of the plan
        self.close()
        tell(outcome.text(self._names(outcome.dropped)))

    def _names(self, units: Set[int]) -> list[str]:
        return [unit.tensors[0] for unit in self._units if unit.unit in units]

    def close(self) -> None:
        """Give the group back, whose threads must not outlive the interpreter (gloo aborts)."""
        if self._control is not None and dist.is_initialized():
            dist.destroy_process_group(self._control)
        self._control = None

    def _largest(self, values: Sequence[float]) -> list[float]:
        assert self._control is not None
        return largest(values, self._control, self._timeout_s)

    def _holds_s(self, steps: Set[int]) -> list[float]:
        return holds_s(self._recorder, self._units, steps)

    def _finish(self) -> None:
        streams.finish(self._device)

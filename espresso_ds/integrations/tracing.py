"""What is common to tracers in a user's own script: they say how far they are, and end it with the trace written."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import torch.distributed as dist

from ..core.errors import EspressoError
from ..core.profile import ModelTrace
from ..core.progress import print_progress
from ..runtime.agree import Agreement
from .initialize import TRACE_ENV

STEPS_ENV = "ESPRESSO_TRACE_STEPS"
WARM_UP = 3


class Tracing:
    """A group of all ranks, and the number of steps to take.

    Args:
        check: raises UnsupportedError where no plan could be kept anyway; every rank raises then.
    """

    def __init__(self, check: Callable[[], None]) -> None:
        self.group = dist.new_group(backend="gloo")
        agreement = Agreement(self.group)
        with agreement.collecting():
            check()
        agreement.settle()
        self.steps = int(os.environ.get(STEPS_ENV, "8"))
        atexit.register(vars(self).pop, "group")  # gloo aborts if its threads outlive the interpreter

    def was_last(self, done: int) -> bool:
        """Say how many steps are done; whether these are all."""
        wanted = self.steps + WARM_UP
        if dist.get_rank() == 0:
            print()  # the script may have a progress bar of its own on this line
            print_progress(done / wanted, f"step {done} of {wanted}")
        return done >= wanted

    def end(self, own: Any, trace: Callable[[list[Any]], ModelTrace]) -> NoReturn:
        """Bring together what each rank has, write the trace made of it, and end the script before it can save anything."""
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, own, group=self.group)
        if dist.get_rank() == 0:
            try:
                trace(ranks).save(os.environ[TRACE_ENV])
            except (EspressoError, OSError) as error:
                print(f"espresso: {error}", file=sys.stderr, flush=True)
                sys.exit(1)
        dist.barrier(group=self.group)
        sys.exit(0)

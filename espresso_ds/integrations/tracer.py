"""`espresso trace` inside the user's own script: times some steps without synchronisation, writes the trace, ends the script.

Each rank trains on its own data alone meanwhile, so what it computes is thrown away; nothing is saved by us, and the script
ends by SystemExit(0) from `engine.step()` before it can save.
"""

from __future__ import annotations

import atexit
import os
import sys
from typing import Any

import torch.distributed as dist

from ..core.errors import EspressoError
from ..core.progress import print_progress
from ..profiler.model import Recorder, StepTimes, summarise
from ..runtime.agree import Agreement
from .engine_facts import check_supported, dtype_name, layout, timing_config, trainable
from .initialize import TRACE_ENV

STEPS_ENV = "ESPRESSO_TRACE_STEPS"
WARM_UP = 3


def attach_tracer(engine: Any) -> None:
    """Time `engine`'s next steps. Collective. Raises UnsupportedError on every rank where no plan could be kept anyway."""
    group = dist.new_group(backend="gloo")
    agreement = Agreement(group)
    with agreement.collecting():
        check_supported(engine)
    agreement.settle()
    _Tracer(engine, group, int(os.environ.get(STEPS_ENV, "8")))


class _Tracer:
    def __init__(self, engine: Any, group: dist.ProcessGroup, steps: int) -> None:
        self._engine, self._group, self._steps = engine, group, steps
        atexit.register(vars(self).pop, "_group")  # gloo aborts if its threads outlive the interpreter
        self._parameters = trainable(engine)
        self._recorder = Recorder(self._parameters)
        self._ranks_per_node = layout().ranks_per_node
        self._backward, self._take_step = engine.backward, engine._take_model_step
        engine.backward = self._timed_backward
        engine._take_model_step = self._timed_step
        engine.buffered_allreduce_fallback = self._instead_of_allreduce

    def _timed_backward(self, *args: Any, **kwargs: Any) -> Any:
        if self._engine.is_gradient_accumulation_boundary() and not self._engine.inside_no_sync_ctxt:
            self._recorder.backward_begins()
        return self._backward(*args, **kwargs)

    def _instead_of_allreduce(self, grads: object = None, elements_per_buffer: int = 0) -> None:
        self._recorder.backward_ends()
        dist.barrier(group=self._group)  # ranks meet here in training, and what follows they do side by side
        self._recorder.goes_on()
        self._engine._get_gradients_for_reduction()  # fills in zeros for unused parameters, as DeepSpeed would

    def _timed_step(self, *args: Any, **kwargs: Any) -> None:
        self._take_step(*args, **kwargs)
        self._recorder.step_ends()
        done = len(self._recorder.steps)
        if dist.get_rank() == 0:
            print()  # the script may have a progress bar of its own on this line
            print_progress(done / (self._steps + WARM_UP), f"step {done} of {self._steps + WARM_UP}")
        if done >= self._steps + WARM_UP:
            self._finish()
        dist.barrier(group=self._group)
        self._recorder.restart()

    def _finish(self) -> None:
        engine = self._engine
        ranks: list[list[StepTimes]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(ranks, self._recorder.steps[WARM_UP:], group=self._group)
        if dist.get_rank() == 0:
            try:
                summarise(
                    ranks,
                    self._parameters,
                    model=type(engine.module).__name__,
                    ranks_per_node=self._ranks_per_node,
                    config=timing_config(engine),
                    wire_dtype=dtype_name(engine.communication_data_type),
                ).save(os.environ[TRACE_ENV])
            except (EspressoError, OSError) as error:
                print(f"espresso: {error}", file=sys.stderr, flush=True)
                sys.exit(1)
        dist.barrier(group=self._group)
        sys.exit(0)

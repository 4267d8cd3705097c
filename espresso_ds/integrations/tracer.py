"""`espresso trace` inside the user's own script: times some steps without synchronisation, writes the trace, ends the script.

Each rank trains on its own data alone meanwhile, so what it computes is thrown away; nothing is saved by us, and the script
ends by SystemExit(0) from `engine.step()` before it can save.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from ..core.profile import ModelTrace
from ..profiler.model import Recorder, StepTimes, summarise
from .engine_facts import check_supported, dtype_name, layout, timing_config, trainable
from .tracing import WARM_UP, Tracing


def attach_tracer(engine: Any) -> None:
    """Time `engine`'s next steps. Collective. Raises UnsupportedError on every rank where no plan could be kept anyway."""
    _Tracer(engine, Tracing(lambda: check_supported(engine)))


class _Tracer:
    def __init__(self, engine: Any, tracing: Tracing) -> None:
        self._engine, self._tracing = engine, tracing
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
        dist.barrier(group=self._tracing.group)  # ranks meet here in training, and what follows they do side by side
        self._recorder.goes_on()
        self._engine._get_gradients_for_reduction()  # fills in zeros for unused parameters, as DeepSpeed would

    def _timed_step(self, *args: Any, **kwargs: Any) -> None:
        self._take_step(*args, **kwargs)
        self._recorder.step_ends()
        if self._tracing.was_last(len(self._recorder.steps)):
            self._tracing.end(self._recorder.steps[WARM_UP:], self._trace)
        dist.barrier(group=self._tracing.group)
        self._recorder.restart()

    def _trace(self, ranks: list[list[StepTimes]]) -> ModelTrace:
        engine = self._engine
        return summarise(
            ranks,
            self._parameters,
            model=type(engine.module).__name__,
            ranks_per_node=self._ranks_per_node,
            config=timing_config(engine),
            wire_dtype=dtype_name(engine.communication_data_type),
        )

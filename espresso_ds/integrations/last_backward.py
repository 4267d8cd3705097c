"""When the gradients of a PipelineEngine are complete: in the last backward pass of its step, one for each micro-batch.

The engine calls itself at a boundary (`is_gradient_accumulation_boundary`) only after all of them, so its instructions are
counted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


class LastBackward:
    """Counts the backward passes of an engine's steps. `close` ends that.

    Args:
        engine: a PipelineEngine.
        begin: called when the last backward pass of a step starts.
    """

    def __init__(self, engine: Any, begin: Callable[[], None]) -> None:
        from deepspeed.runtime.pipe.schedule import BackwardPass

        self._engine, self._begin = engine, begin
        self._kind, self._original = BackwardPass, engine._INSTRUCTION_MAP[BackwardPass]
        self._seen, self._completes = 0, False
        self._schedule = engine._exec_schedule
        engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, BackwardPass: self._counted()}
        engine._exec_schedule = self._from_zero

    def completes(self) -> bool:
        """Whether a gradient that is accumulated now is complete."""
        return self._completes

    def close(self) -> None:
        """Give the engine back its instruction."""
        self._engine._INSTRUCTION_MAP = {**self._engine._INSTRUCTION_MAP, self._kind: self._original}
        vars(self._engine).pop("_exec_schedule", None)

    def _from_zero(self, schedule: Any) -> None:
        """A schedule, counted from its start: the one before may have ended in an error."""
        self._seen = 0
        self._schedule(schedule)

    def _counted(self) -> Callable[..., None]:
        @functools.wraps(self._original)
        def instruction(engine: Any, buffer_id: int) -> None:
            self._seen += 1
            if self._seen == engine.micro_batches:
                self._begin()
                self._completes = _is_one_pass(engine, buffer_id)
            try:
                self._original(engine, buffer_id)
            finally:
                self._completes = False

        return instruction


def _is_one_pass(engine: Any, buffer_id: int) -> bool:
    """Whether autograd runs once in this backward pass: it runs for each tensor that the stage sends on, and a gradient may
    grow each time.
    """
    if engine.is_last_stage():
        return True
    outputs = engine.pipe_buffers["outputs"][buffer_id]
    return isinstance(outputs, torch.Tensor) or sum(tensor.is_floating_point() for tensor in outputs) == 1

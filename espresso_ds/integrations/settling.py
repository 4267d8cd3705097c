"""What becomes of the memory of feedback after each optimizer step: kept if the step was taken, brought back if it was skipped.

DeepSpeed's fp16 optimizer (which at ZeRO stage 0 serves bf16 too) skips a step whose gradients overflow, and changes the loss
scale. Memory is in units of the gradients, so it follows the scale that the loss is multiplied by. At stage 0 that is none:
DeepSpeed 0.19.8 multiplies the loss for ZeRO's optimizers only, though its fp16 optimizer divides by the scale all the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from .optimizer_gradients import keeps_gradients


class Settled(Protocol):
    """A memory of feedback: `Feedback`, or PowerSGD's."""

    scale: float
    reversible: bool

    def commit(self) -> None:
        """Keep what was remembered since the last commit."""

    def rollback(self) -> None:
        """Forget it."""

    def rescale(self, factor: float) -> None:
        """Multiply all of it."""


def precision_of(engine: Any) -> str:
    """`fp16`, `bf16` or `fp32`."""
    return "bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "fp32"


def loss_scale(engine: Any) -> float:
    """What `engine.backward` multiplies the loss by at present, and with it the gradients."""
    from deepspeed.runtime.base_optimizer import ZeROOptimizer

    if not isinstance(engine.optimizer, ZeROOptimizer) or keeps_gradients(engine):  # BF16_Optimizer is one by name, and has none
        return 1.0
    return float(engine.optimizer.loss_scale)


def settle_after_steps(
    engine: Any, memories: Sequence[Settled], committed: Callable[[], None] = lambda: None
) -> Callable[[], None]:
    """Settle `memories` after each of the engine's optimizer steps, and call `committed` after each that was not taken back.
    Returns what undoes it.

    Gradients are alike on all ranks once they are synchronised, so all ranks skip the same steps.
    """
    take_step = engine._take_model_step

    def follow_scale() -> None:
        for memory in memories:
            memory.rescale(loss_scale(engine) / memory.scale)

    @functools.wraps(take_step)
    def take_and_settle(*args: Any, **kwargs: Any) -> Any:
        result = take_step(*args, **kwargs)
        applied = engine.was_step_applied()
        for memory in memories:
            if applied or not memory.reversible:
                memory.commit()
            else:
                memory.rollback()
        if applied or not any(memory.reversible for memory in memories):
            committed()
        follow_scale()
        return result

    def undo() -> None:
        engine.__dict__.pop("_take_model_step", None)

    follow_scale()
    engine._take_model_step = take_and_settle
    return undo

"""Gradients that DeepSpeed's BF16_Optimizer keeps beside those of the parameters, in its own dtype: it reduces and steps by them.

A PipelineModule in bf16 has them, at ZeRO stage 0 and, where gradients accumulate in fp32, at stage 1. Every rank holds all of
them. After each backward pass the optimizer adds what the parameters have; in the last one of a step we have it do so
parameter by parameter, so that they can leave at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .deepspeed_version import unknown_deepspeed

NEEDED = ("bf16_groups", "fp32_groups_gradients", "_update_hp_grad")


class OptimizerGradients:
    """Where the optimizer of a PipelineEngine keeps gradients; nowhere but in `param.grad` if it is no BF16_Optimizer.

    Raises:
        UnsupportedError: a BF16_Optimizer that is not as we know it.
    """

    def __init__(self, engine: Any) -> None:
        self._optimizer = engine.optimizer if keeps_gradients(engine) else None
        self._places: dict[torch.nn.Parameter, tuple[int, int]] = {}
        if self._optimizer is None:
            return
        if missing := [name for name in NEEDED if not hasattr(self._optimizer, name)]:
            raise unknown_deepspeed(f"its BF16_Optimizer has no {missing[0]}")
        for group, params in enumerate(self._optimizer.bf16_groups):
            self._places |= {param: (group, number) for number, param in enumerate(params)}

    def of(self, param: torch.nn.Parameter) -> Tensor | None:
        """The optimizer's gradient of a parameter, flat; None where it is in `param.grad`."""
        if self._optimizer is None:
            return None
        group, number = self._places[param]
        return self._optimizer.fp32_groups_gradients[group][number]

    def lacks(self, param: torch.nn.Parameter) -> bool:
        """Whether it is a BF16_Optimizer that does not step this parameter, so that DeepSpeed does not reduce its gradient."""
        return self._optimizer is not None and param not in self._places

    def take(self, param: torch.nn.Parameter) -> None:
        """Have the optimizer add the parameter's gradient to its own now, and not once more after the pass."""
        if self._optimizer is not None:
            self._optimizer._update_hp_grad(param, *self._places[param], clear_lp_grads=False)
            param.grad = None


def keeps_gradients(engine: Any) -> bool:
    """Whether gradients are those of a BF16_Optimizer."""
    return getattr(engine, "using_bf16_optimizer", False)

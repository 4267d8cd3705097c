"""Which training examples a micro-batch of a PipelineEngine holds: a number for each, so that AQ-SGD knows them again.

The first stage finds them; the others get them with the activations.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.errors import UnsupportedError

_PRIME = 0x100000001B3


class ExampleNumbers:
    """Numbers of the micro-batches under way on this stage, in the order in which their activations leave it.

    Args:
        engine: a PipelineEngine; on its first stage its `_next_batch` is wrapped.
        rule: what tells examples apart where batches have no third item: their content, or their position in the epoch.

    Raises:
        UnsupportedError: positions of an epoch whose length is unknown.
    """

    def __init__(self, engine: Any, rule: Literal["content", "position"]) -> None:
        self._waiting: deque[Tensor] = deque()
        self._engine, self._rule, self._loaded = engine, rule, 0
        if engine.is_first_stage():
            self._epoch = _epoch(engine) if rule == "position" else 0
            engine._next_batch = self._wrapped(engine._next_batch)

    def add(self, numbers: Tensor) -> None:
        """Those of the next micro-batch, as they came from the stage before."""
        self._waiting.append(numbers)

    def take(self) -> Tensor:
        """Those of the micro-batch whose activations leave now: int64, one for each example."""
        return self._waiting.popleft()

    def detach(self) -> None:
        """Give the engine its `_next_batch` back."""
        vars(self._engine).pop("_next_batch", None)

    def _wrapped(self, original: Callable[[], Any]) -> Callable[[], Any]:
        @functools.wraps(original)
        def next_batch() -> Any:
            batch = original()
            if torch.is_grad_enabled():
                self.add(self._numbers(batch))
            return batch

        return next_batch

    def _numbers(self, batch: Any) -> Tensor:
        if len(batch) > 2 and isinstance(batch[2], Tensor):
            return batch[2].to("cpu", torch.int64)
        tensors = [batch[0]] if isinstance(batch[0], Tensor) else list(batch[0])
        if self._rule == "content":
            return by_content(tensors)
        start = self._loaded % self._epoch * len(tensors[0])
        self._loaded += 1
        return torch.arange(start, start + len(tensors[0]))


def by_content(tensors: list[Tensor]) -> Tensor:
    """Hashes of the examples' bytes over all tensors: int64, shape (examples,). Equal examples have equal ones."""
    found = torch.zeros(len(tensors[0]), dtype=torch.int64)
    for tensor in tensors:
        rows = tensor.detach().cpu().reshape(len(tensor), -1).contiguous().view(torch.uint8)
        words = torch.nn.functional.pad(rows, (0, -rows.shape[1] % 4)).view(torch.int32).long()
        factors = torch.randint(-(2**62), 2**62, (words.shape[1],), generator=torch.Generator().manual_seed(words.shape[1])) | 1
        mixed = words * factors  # wraps around, as sums do
        found = found * _PRIME + (mixed ^ (mixed >> 29)).sum(1)
    return found


def _epoch(engine: Any) -> int:
    """Micro-batches of an epoch."""
    try:
        return len(engine.training_dataloader.loader)
    except (AttributeError, TypeError):
        raise UnsupportedError(
            '"examples": "position" needs to know how long an epoch is: give deepspeed.initialize the training_data, give '
            'batches a third item with the numbers of the examples, or set "examples" to "content"'
        ) from None

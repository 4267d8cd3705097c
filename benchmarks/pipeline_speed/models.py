"""Two models: a narrow ResNet, whose stages compute as little for what they send as an accelerator's at such rates, and a narrow
GPT-2, whose stages compute as long as their messages take.

Each stage is one layer of a PipelineModule; all are alike, so that every boundary carries the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import Tensor, nn
from torch.nn import functional

MICRO_BATCHES = 8


class TextStage(nn.TransformerEncoderLayer):
    """One block of width 64 over sequences of 128."""

    def __init__(self) -> None:
        super().__init__(64, 2, 256, 0.0, batch_first=True, norm_first=True)


class ImageStage(nn.Module):
    """A basic block of 16 channels over images of 32 x 32."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))
        self.norm = nn.GroupNorm(4, 16)

    def forward(self, x: Tensor) -> Tensor:
        """Images to images."""
        return x + self.second(functional.relu(self.norm(self.first(x))))


class Workload(NamedTuple):
    """A stage, and the shape of a micro-batch before and after every one of them."""

    stage: type[nn.Module]
    shape: tuple[int, ...]


MODELS: Mapping[str, Workload] = MappingProxyType(
    {"text": Workload(TextStage, (32, 128, 64)), "image": Workload(ImageStage, (16, 16, 32, 32))}
)


def module(name: str, stages: int) -> PipelineModule:
    """The model, from equal weights each time."""
    torch.manual_seed(0)
    return PipelineModule([LayerSpec(MODELS[name].stage) for _ in range(stages)], num_stages=stages, loss_fn=_loss)


def ds_config(name: str) -> dict[str, Any]:
    """DeepSpeed's settings."""
    return {
        "train_micro_batch_size_per_gpu": MODELS[name].shape[0],
        "gradient_accumulation_steps": MICRO_BATCHES,
        "steps_per_print": 10**9,
        "optimizer": {"type": "SGD", "params": {"lr": 0.01}},
    }


def batches(name: str) -> Iterator[tuple[Tensor, Tensor]]:
    """The same few micro-batches, over and over: what they hold changes no step's time."""
    generator = torch.Generator().manual_seed(1)
    few = [torch.randn(MODELS[name].shape, generator=generator) for _ in range(4)]
    while True:
        for x in few:
            yield x, x.flip(0)


def _loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return (outputs - labels).pow(2).mean()

"""The two models, each as four layers of which a pipeline has one a stage: a uniform partition has the paper's boundaries.

Image: a narrow ResNet-18, four groups of two basic blocks with batch normalisation; boundaries between the groups. Text: GPT-2
over bytes, twelve narrow blocks; boundaries after blocks 2, 5 and 8, counted from 0. Its output layer has weights of its own:
GPT-2 shares them with the embedding, which lies on another stage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from .data import LENGTH, Parts, images, windows

STAGES = 4
CHANNELS = (16, 32, 64, 64)
STRIDES = (1, 2, 2, 1)
"""Sides of 8, 4, 2 and 2: the last group is not halved, a single place would leave convolutions nothing to do."""
CLASSES = 10
BLOCKS, WIDTH, HEADS, BYTES = 12, 64, 4, 256


class BasicBlock(nn.Module):
    """ResNet's: two convolutions beside a way around them."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = _convolution(before, after, stride)
        self.second = _convolution(after, after, 1)
        same = before == after and stride == 1
        self.around = nn.Identity() if same else nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), _norm(after))

    def forward(self, x: Tensor) -> Tensor:
        """Images to images."""
        return functional.relu(self.second(functional.relu(self.first(x))) + self.around(x))


class ImageStage(nn.Sequential):
    """A group of two blocks, with the first convolution before the first group and the output layer after the last."""

    def __init__(self, stage: int) -> None:
        before, after = CHANNELS[max(stage - 1, 0)], CHANNELS[stage]
        head = [_convolution(1, before, 1), nn.ReLU()] if stage == 0 else []
        tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(after, CLASSES)] if stage == STAGES - 1 else []
        super().__init__(*head, BasicBlock(before, after, STRIDES[stage]), BasicBlock(after, after, 1), *tail)


class GptBlock(nn.Module):
    """GPT-2's: attention to what came before and two linear layers, each after a normalisation and beside a way around."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(approximate="tanh"), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states to hidden states."""
        size, length, _ = x.shape
        parts = self.qkv(self.norms[0](x)).view(size, length, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        found = functional.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.out(found.transpose(1, 2).reshape(size, length, WIDTH))
        return x + self.mlp(self.norms[1](x))


class TextStage(nn.Module):
    """Three blocks, with the embedding before the first ones and the output layer after the last."""

    def __init__(self, stage: int) -> None:
        super().__init__()
        first, last = stage == 0, stage == STAGES - 1
        self.tokens = nn.Embedding(BYTES, WIDTH) if first else None
        self.places = nn.Embedding(LENGTH, WIDTH) if first else None
        self.blocks = nn.Sequential(*(GptBlock() for _ in range(BLOCKS // STAGES)))
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, BYTES, bias=False)) if last else nn.Identity()
        for name, weights in self.named_parameters():
            if weights.dim() > 1:
                added = name.endswith(("out.weight", "mlp.2.weight"))  # to the stream past all blocks: smaller, as in GPT-2
                nn.init.normal_(weights, std=0.06 / (2 * BLOCKS) ** 0.5 if added else 0.06)

    def forward(self, x: Tensor) -> Tensor:
        """Bytes or hidden states to hidden states or logits."""
        if self.tokens is not None and self.places is not None:
            x = self.tokens(x) + self.places.weight
        return self.head(self.blocks(x))


@dataclass(frozen=True)
class Setup:
    """How a model is trained; results keep it, those of another setup are not mixed with them.

    Attributes:
        micro_batch: examples.
        micro_batches: of a step.
        epochs: over all training examples.
        lr: highest learning rate.
        start_steps: of training without a pipeline before all methods start from these weights; 0: they start from scratch.
    """

    micro_batch: int
    micro_batches: int
    epochs: int
    lr: float
    start_steps: int = 0

    def dump(self) -> dict[str, int | float]:
        """As results keep it."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Model:
    """A model with its data and optimizer.

    Attributes:
        name: key in MODELS.
        stage: makes the layer of a stage.
        parts: gives the examples.
        metric: what is measured on the held-out part, for people.
        higher_is_better: which way it improves.
        much: a difference of the metric that matters to its user.
        measure: the metric, from outputs and labels.
        optimizer: of parameters, with a learning rate.
        setup: of training.
    """

    name: str
    stage: Callable[[int], nn.Module]
    parts: Callable[[], Parts]
    metric: str
    higher_is_better: bool
    much: float
    measure: Callable[[Tensor, Tensor], Tensor]
    optimizer: Callable[..., torch.optim.Optimizer]
    setup: Setup

    def layer(self, stage: int, seed: int, start: Path | None = None) -> nn.Module:
        """The layer of a stage, with the weights of a start or those of a seed; torch's generator is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(STAGES * seed + stage)
            made = self.stage(stage)
        if start is not None:
            made.load_state_dict(torch.load(start, weights_only=True)[stage])
        return made

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """What is trained on; while evaluating, the metric: the pipeline engine has one function for both."""
        return cross_entropy(outputs, labels) if torch.is_grad_enabled() else self.measure(outputs, labels)


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Mean over all examples and places, in nats."""
    return functional.cross_entropy(outputs.flatten(0, -2), labels.flatten())


def accuracy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Percent."""
    return (outputs.argmax(-1) == labels).float().mean() * 100


def sgd(params: object, lr: float) -> torch.optim.Optimizer:
    """The image model's, as in the paper."""
    return torch.optim.SGD(params, lr, momentum=0.9, weight_decay=5e-4)


def adamw(params: object, lr: float) -> torch.optim.Optimizer:
    """The text model's."""
    return torch.optim.AdamW(params, lr, weight_decay=0.01)


def _convolution(before: int, after: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, stride, 1, bias=False), _norm(after))


def _norm(channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels)


MODELS: Mapping[str, Model] = {
    model.name: model
    for model in (
        Model(
            name="image",
            stage=ImageStage,
            parts=images,
            metric="held-out accuracy, %",
            higher_is_better=True,
            much=2.0,
            measure=accuracy,
            optimizer=sgd,
            setup=Setup(micro_batch=16, micro_batches=4, epochs=20, lr=0.05),
        ),
        Model(
            name="text",
            stage=TextStage,
            parts=windows,
            metric="held-out loss, nats per byte",
            higher_is_better=False,
            much=0.05,
            measure=cross_entropy,
            optimizer=adamw,
            setup=Setup(micro_batch=8, micro_batches=4, epochs=4, lr=3e-4, start_steps=2000),
        ),
    )
}

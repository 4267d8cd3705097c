"""The models that race: two of GPT-2's kind, one of MiniLM's shape, one of VGG's, each with data it can learn from in 60 steps.

All start from random weights. Many variants live in one process, hence Adagrad: one value of state for a weight, and within 60
steps as good as AdamW (bytes with 5M parameters end at 2.92 and 2.90, SGD with momentum at 3.24). Its learning rate rises over
the first steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from .data import CHARACTERS, Batch, Glyphs, MaskedTokens, NextByte, Source

BYTES = 256
INITIAL_RANGE = 0.06
"""Deviation of first weights: three times GPT-2's, as these are narrower; with less, 60 steps teach frequencies only."""


class NextByteModel(torch.nn.Module):
    """GPT-2 over bytes, without dropout; forward gives the mean cross entropy in nats."""

    def __init__(self, layers: int, width: int, heads: int, length: int) -> None:
        super().__init__()
        config = GPT2Config(
            vocab_size=BYTES,
            n_positions=length,
            n_embd=width,
            n_layer=layers,
            n_head=heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            initializer_range=INITIAL_RANGE,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
        )
        self.gpt2 = GPT2LMHeadModel(config)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Loss of `NextByte`'s batch."""
        (tokens,) = batch
        logits = self.gpt2(tokens).logits
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


class MaskedTokenModel(torch.nn.Module):
    """BERT without dropout; its head sees masked places only."""

    def __init__(self, layers: int, width: int, heads: int, rows: int) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=rows,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.masked = BertForMaskedLM(config)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Loss of `MaskedTokens`' batch."""
        tokens, places, labels = batch
        hidden = self.masked.bert(tokens).last_hidden_state
        hidden = hidden.gather(1, places.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
        return functional.cross_entropy(self.masked.cls(hidden).flatten(0, 1), labels.flatten())


class GlyphModel(torch.nn.Module):
    """VGG: four blocks of 3 x 3 convolutions, three fully connected layers of which the first is huge; no normalisation."""

    def __init__(self, side: int, channels: int, huge: int, small: int) -> None:
        super().__init__()
        layers: list[torch.nn.Module] = []
        before = 1
        for block in range(4):
            after = channels << block
            layers += [torch.nn.Conv2d(before, after, 3, padding=1), torch.nn.ReLU()]
            if block < 3:  # the last one's places are what makes the first fully connected layer huge
                layers.append(torch.nn.MaxPool2d(2))
            before = after
        self.features = torch.nn.Sequential(*layers, torch.nn.Flatten())
        self.classifier = torch.nn.Sequential(
            torch.nn.Linear(before * (side // 8) ** 2, huge),
            torch.nn.ReLU(),
            torch.nn.Linear(huge, small),
            torch.nn.ReLU(),
            torch.nn.Linear(small, len(CHARACTERS)),
        )
        for layer in self.modules():
            if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
                torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                torch.nn.init.zeros_(layer.bias)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Loss of `Glyphs`' batch."""
        images, labels = batch
        return functional.cross_entropy(self.classifier(self.features(images)), labels)


@dataclass(frozen=True, eq=False)
class Workload:
    """A model with its data and optimizer.

    Attributes:
        name: key in MODELS.
        network: class of the model; its forward takes a batch and gives the scalar loss.
        shape: arguments of `network`.
        source: of batches.
        batch_size: examples of a rank's batch.
        lr: learning rate after warm-up.
        tiny_changes: fields of `tiny()`.
        warm_up_steps: over which the learning rate rises from lr / warm_up_steps.
    """

    name: str
    network: Callable[..., torch.nn.Module]
    shape: Mapping[str, int]
    source: Source
    batch_size: int
    lr: float
    tiny_changes: Mapping[str, Any]
    warm_up_steps: int = 20

    def build(self, seed: int) -> torch.nn.Module:
        """The model, with weights that depend on `seed` alone; torch's generator is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.network(**self.shape)

    def batch(self, rank: int, step: int, seed: int) -> Batch:
        """A rank's batch of a step: other ranks, steps and seeds have others."""
        return self.source.batch(np.random.default_rng((seed, step, rank)), self.batch_size)

    def eval_loss(self, model: torch.nn.Module) -> float:
        """Mean loss on the held-out part; the model is left in the mode it was in."""
        was_training = model.training
        model.eval()
        with torch.no_grad():
            losses = [model(batch).item() for batch in self.source.held_out()]
        model.train(was_training)
        return sum(losses) / len(losses)

    def optimizer(self, params: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """Adagrad, that warms up by itself, whoever calls its `step`."""
        made = torch.optim.Adagrad(params, self.lr / self.warm_up_steps, fused=True)
        taken = 0

        def warm_up(optimizer: torch.optim.Optimizer, *_: object) -> None:
            nonlocal taken
            taken += 1
            for group in optimizer.param_groups:
                group["lr"] = self.lr * min(1.0, taken / self.warm_up_steps)

        made.register_step_pre_hook(warm_up)
        return made

    def tiny(self) -> Workload:
        """The same with few parameters, for tests."""
        return replace(self, **{"name": f"{self.name} tiny", **self.tiny_changes})


def _next_byte(name: str, layers: int, width: int, heads: int, batch_size: int, lr: float) -> Workload:
    return Workload(
        name=name,
        network=NextByteModel,
        shape={"layers": layers, "width": width, "heads": heads, "length": 128},
        source=NextByte(128),
        batch_size=batch_size,
        lr=lr,
        tiny_changes={"shape": {"layers": 1, "width": 32, "heads": 2, "length": 32}, "source": NextByte(32), "lr": 0.02},
    )


MODELS: Mapping[str, Workload] = {
    workload.name: workload
    for workload in (
        _next_byte("gpt2-5m", layers=6, width=256, heads=4, batch_size=4, lr=3e-3),
        _next_byte("gpt2-30m", layers=6, width=640, heads=10, batch_size=4, lr=1.5e-3),
        Workload(
            name="minilm",
            network=MaskedTokenModel,
            shape={"layers": 6, "width": 384, "heads": 12, "rows": 30522},
            source=MaskedTokens(length=64, vocabulary=2048),
            batch_size=4,
            lr=3e-3,
            tiny_changes={
                "shape": {"layers": 1, "width": 32, "heads": 2, "rows": 512},
                "source": MaskedTokens(length=32, vocabulary=512),
                "lr": 0.02,
            },
        ),
        Workload(
            name="vgg",
            network=GlyphModel,
            shape={"side": 32, "channels": 64, "huge": 2432, "small": 1024},
            source=Glyphs(32),
            batch_size=32,
            lr=0.001,
            tiny_changes={"shape": {"side": 32, "channels": 4, "huge": 64, "small": 32}},
        ),
    )
}

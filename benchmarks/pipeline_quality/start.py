"""The weights that every method starts from: trained in one process, without stages and compression, kept in the work folder."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from .data import LENGTH, docstrings
from .models import STAGES, Model, cross_entropy

SIZE, LR, WARM_UP = 16, 3e-3, 100


def make_start(model: Model, folder: Path, steps: int) -> Path | None:
    """A file with the state of each stage's layer, made if it is not there; None for a model that starts from scratch."""
    if not steps:
        return None
    path = folder / f"start-{model.name}-{steps}.pt"
    if not path.exists():
        layers = [model.layer(stage, 0) for stage in range(STAGES)]
        _train(nn.Sequential(*layers), steps)
        torch.save([layer.state_dict() for layer in layers], path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)
    return path


def _train(network: nn.Module, steps: int) -> None:
    """Next bytes of docstrings, at random places."""
    tokens, generator = docstrings(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(network.parameters(), LR, weight_decay=0.01)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / WARM_UP, 1 - step / steps))
    for step in range(steps):
        places = torch.randint(len(tokens) - LENGTH, (SIZE, 1), generator=generator) + torch.arange(LENGTH + 1)
        chosen = tokens[places]
        loss = cross_entropy(network(chosen[:, :-1]), chosen[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        rates.step()
        if (step + 1) % 500 == 0 or step + 1 == steps:
            print(f"start: step {step + 1} of {steps}, loss {loss.item():.3f}", flush=True)

"""A ModelTrace of a Hugging Face model by name or config, with random tokens: for planning before there is a training script."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from ..core.errors import FileError
from ..core.profile import ModelTrace
from ..profiler.model import Recorder, summarise

WARM_UP = 2


def trace_hf_model(
    name: str, batch: int, sequence: int, steps: int, world_size: int, ranks_per_node: int, report: Callable[[float, str], None]
) -> ModelTrace:
    """Time `steps` training steps of a language model with random weights, in this process.

    Args:
        name: model directory, path of a config.json, or name that transformers resolves.
        batch: sequences per step.
        sequence: tokens per sequence.
        steps: steps to time.
        world_size: ranks that the plan will be for; every rank is taken to be as fast as this process.
        ranks_per_node: of these, on one host.
        report: called with the share done and what is being done.

    Raises:
        FileError: the model cannot be built from `name`.
    """
    model = _build(name).train()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    parameters = {key: p for key, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-5)
    tokens = torch.randint(0, model.config.vocab_size, (batch, sequence), generator=torch.Generator().manual_seed(0)).to(device)
    recorder = Recorder(parameters)
    for step in range(WARM_UP + steps):
        report(step / (WARM_UP + steps), f"step {step + 1} of {WARM_UP + steps}")
        recorder.restart()
        loss = model(input_ids=tokens, labels=tokens).loss
        recorder.backward_begins()
        loss.backward()
        recorder.backward_ends()
        optimizer.step()
        optimizer.zero_grad()
        recorder.step_ends()
    recorder.remove()
    return summarise(
        [recorder.steps[WARM_UP:]] * world_size,
        parameters,
        model=name,
        ranks_per_node=ranks_per_node,
        config={
            "device": device.type,
            "train_micro_batch_size_per_gpu": batch,
            "gradient_accumulation_steps": 1,
            "zero_stage": 0,
            "precision": "fp32",
            "communication_data_type": "float32",
        },
        wire_dtype="float32",
    )


def _build(name: str) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(os.path.dirname(name) or "." if Path(name).name == "config.json" else name)
    except (OSError, ValueError) as error:
        raise FileError(f"--hf-model {name}: {error}") from None
    for kind in (AutoModelForCausalLM, AutoModelForMaskedLM):
        if type(config) in kind._model_mapping:
            return kind.from_config(config)
    raise FileError(
        f"--hf-model {name}: {config.model_type} is no language model; trace your own script with `espresso trace train.py`"
    )

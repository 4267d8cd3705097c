"""One stage of all runs of a job, a fresh engine each; stage 0 writes each run down as soon as it is finished.

torchrun --nproc-per-node 4 -m benchmarks.pipeline_quality.rank JOB.json
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule

import espresso_ds.integrations.boot  # noqa: F401 - where the start-up hook is not installed

from .data import MicroBatch, epoch, in_order
from .methods import METHODS, Method
from .models import MODELS, STAGES, Model, Setup
from .results import Run, Study

DEADLINE_S = 120


def engine_of(model: Model, setup: Setup, method: Method, seed: int, start: Path | None) -> Any:
    """A pipeline engine; the learning rate falls to nothing along half a cosine."""
    layers = [model.layer(stage, seed, start) for stage in range(STAGES)]
    module = PipelineModule(layers, num_stages=STAGES, loss_fn=model.loss, partition_method="uniform")
    optimizer = model.optimizer(module.parameters(), setup.lr)
    steps = setup.epochs * steps_of_epoch(model, setup)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * min(step / steps, 1.0))) / 2)
    config = {
        "train_micro_batch_size_per_gpu": setup.micro_batch,
        "gradient_accumulation_steps": setup.micro_batches,
        "steps_per_print": 10**9,
    }
    if method.settings is not None:
        config["espresso"] = {"pipeline": method.settings, "timeout_s": DEADLINE_S}
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, lr_scheduler=rates, config=config)
    return engine


def steps_of_epoch(model: Model, setup: Setup) -> int:
    """Optimizer steps over all training examples once."""
    return len(model.parts().training.inputs) // (setup.micro_batch * setup.micro_batches)


def run(model: Model, setup: Setup, method: Method, seed: int, start: Path | None) -> Run:
    """Train and evaluate; collective, the same result on every stage."""
    began = time.perf_counter()
    engine = engine_of(model, setup, method, seed, start)
    losses: list[float] = []
    batches, steps = _all_epochs(model, setup, seed), steps_of_epoch(model, setup)
    while len(losses) < setup.epochs * steps and (not losses or math.isfinite(losses[-1])):
        losses.append(engine.train_batch(batches).item())
    compressed = uncompressed = math.nan
    if math.isfinite(losses[-1]):
        compressed = uncompressed = _evaluate(engine, model, setup)
        if method.settings is not None:
            engine.espresso.evaluates = False
            uncompressed = _evaluate(engine, model, setup)
    if method.settings is not None:
        vars(engine).pop("espresso").detach()
    engine.destroy()
    return Run(
        method=method.name,
        settings=None if method.settings is None else dict(method.settings),
        seed=seed,
        compressed=compressed,
        uncompressed=uncompressed,
        training_loss=statistics.fmean(losses[-steps:]),
        seconds=round(time.perf_counter() - began, 2),
    )


def _all_epochs(model: Model, setup: Setup, seed: int) -> Iterator[MicroBatch]:
    for number in range(setup.epochs):
        yield from epoch(model.parts().training, setup.micro_batch, seed, number)


def _evaluate(engine: Any, model: Model, setup: Setup) -> float:
    held_out = model.parts().held_out
    count = len(held_out.inputs) // setup.micro_batch
    return round(engine.eval_batch(in_order(held_out, setup.micro_batch), num_micro_batches=count).item(), 5)


def main() -> None:
    """Run the job of the file named on the command line."""
    job = json.loads(Path(sys.argv[1]).read_text())
    model, setup, out = MODELS[job["model"]], Setup(**job["setup"]), Path(job["out"])
    start = Path(job["start"]) if job["start"] else None
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo")
    for name, seed in job["runs"]:
        done = run(model, setup, METHODS[name], seed, start)
        if dist.get_rank() == 0:
            Study.load(out).having(done).save(out)
            print(f"{model.name}, seed {seed}, {name}: {done.compressed} {done.uncompressed} in {done.seconds:.1f} s", flush=True)
    dist.barrier()
    os._exit(0)  # gloo's threads may abort the interpreter's end


if __name__ == "__main__":
    main()

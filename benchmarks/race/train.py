"""The training script of a race's model, as a user has it: what `espresso trace` runs.

espresso trace --hostfile hosts -o trace.json benchmarks/race/train.py --model gpt2-5m
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import deepspeed
import torch
import torch.distributed as dist

import espresso_ds.integrations.boot  # noqa: F401 - where the start-up hook is not installed
from benchmarks.race.models import MODELS
from benchmarks.race.variants import ds_config


def main() -> None:
    """Train for a while."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=sorted(MODELS), required=True)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--local_rank", type=int, default=0, help="given by some launchers, unused")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    workload = MODELS[arguments.model]
    model = workload.build(0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=workload.optimizer(model.parameters()), config=ds_config(workload))
    for step in range(arguments.steps):
        engine.backward(engine(workload.batch(dist.get_rank(), step, 0)))
        engine.step()


if __name__ == "__main__":
    main()

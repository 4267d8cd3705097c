"""One stage of the benchmark: trains all variants in turn, at one rate after the other.

mpirun ... python -m benchmarks.pipeline_speed.rank JOB.json
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import espresso_ds.integrations.boot  # noqa: F401 - before DeepSpeed
from benchmarks.race.rank import sent_bytes, shape_links, slowest

from .models import batches, ds_config, module
from .results import BF16, PLAIN

PORT = 29618
BUILT_STEPS, STEPS_PER_TURN = 2, 2


@contextlib.contextmanager
def bf16_on_the_wire() -> Iterator[None]:
    """What a user could do about DeepSpeed's messages: cast them."""
    from deepspeed.runtime.pipe import p2p

    send, recv = p2p.send, p2p.recv

    def narrow_send(tensor: torch.Tensor, stage: int, async_op: bool = False) -> Any:
        return send(tensor.bfloat16() if tensor.is_floating_point() else tensor, stage, async_op)

    def narrow_recv(tensor: torch.Tensor, stage: int, async_op: bool = False) -> Any:
        if not tensor.is_floating_point():
            return recv(tensor, stage, async_op)
        narrow = torch.empty_like(tensor, dtype=torch.bfloat16)
        recv(narrow, stage, async_op)
        tensor.data.copy_(narrow)
        return None

    p2p.send, p2p.recv = narrow_send, narrow_recv
    try:
        yield
    finally:
        p2p.send, p2p.recv = send, recv


class Variant:
    """One engine, and how its messages travel."""

    def __init__(self, name: str, job: dict[str, Any], espresso: dict[str, Any] | None) -> None:
        import deepspeed

        config = ds_config(job["model"]) | ({} if espresso is None else {"espresso": espresso})
        self.engine, *_ = deepspeed.initialize(model=module(job["model"], job["stages"]), config=config)
        self.data, self.narrow = batches(job["model"]), name == BF16
        self.step_s: list[float] = []
        self.sent: list[float] = []

    def train(self, steps: int, timed: bool) -> None:
        """Take steps; each is timed from the end of the one before."""
        with bf16_on_the_wire() if self.narrow else contextlib.nullcontext():
            dist.barrier()
            start, sent = time.perf_counter(), sent_bytes()
            for _ in range(steps):
                self.engine.train_batch(self.data)
                end = time.perf_counter()
                if timed:
                    self.step_s.append(end - start)
                start = end
            dist.barrier()
            if timed:
                self.sent.append((sent_bytes() - sent) / steps)

    def close(self) -> None:
        """Let its channels and memory go."""
        if hasattr(self.engine, "espresso"):
            self.engine.espresso.detach()
        self.engine.destroy()


def at_rate(rate: str, job: dict[str, Any], plain: dict[str, Variant], blocks: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Time all variants at one rate."""
    shape_links("none", dist.get_rank())
    ours = {name: Variant(name, job, block) for name, block in blocks.items()}
    every = plain | ours
    for variant in every.values():
        variant.train(BUILT_STEPS, timed=False)
        variant.step_s, variant.sent = [], []
    shape_links(rate, dist.get_rank())
    for variant in every.values():
        variant.train(1, timed=False)
    for number in range(rounds):
        for variant in every.values():
            variant.train(1, timed=False)
            variant.train(STEPS_PER_TURN, timed=True)
        if dist.get_rank() == 0:
            print(f"{job['model']}, {job['stages']} stages, {rate}: round {number + 1} of {rounds}", flush=True)
    found = {}
    for name, variant in every.items():
        most = torch.tensor(statistics.median(variant.sent), dtype=torch.float64)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        found[name] = {"step_s": slowest(variant.step_s), "sent_bytes": most.item()}
    shape_links("none", dist.get_rank())
    for variant in ours.values():
        variant.close()
    return found


def main() -> None:
    """Run the job of the file named on the command line; rank 0 writes the results."""
    job = json.loads(Path(sys.argv[1]).read_text())
    rank, world = (int(os.environ[f"OMPI_COMM_WORLD_{key}"]) for key in ("RANK", "SIZE"))
    local = {f"LOCAL_{key}": os.environ[f"OMPI_COMM_WORLD_LOCAL_{key}"] for key in ("RANK", "SIZE")}
    os.environ |= local | {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "host0", "MASTER_PORT": str(PORT)}
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    plain = {name: Variant(name, job, None) for name in (PLAIN, BF16)}
    found = {rate: at_rate(rate, job, plain, blocks, job["rounds"]) for rate, blocks in job["rates"].items()}
    if rank == 0:
        Path(job["out"]).write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # gloo's threads may abort the interpreter's end


if __name__ == "__main__":
    main()

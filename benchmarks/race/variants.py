"""Ways to train the same model on the same ranks: DeepSpeed, DDP and its hooks, plans of ours, and no synchronisation at all.

Each is a `Training`: a model, an optimizer and `step(batch)`. Plans attach as they do in any script, by the config given to
`deepspeed.initialize`.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from .models import Workload
from .results import BOUND

BUCKET_BYTES = 25 * 2**20
"""DDP's default."""
POWERSGD_STARTS = 2
"""Steps that PowerSGD leaves uncompressed; its error feedback and warm start want two at least."""


class Training:
    """One variant's model in training.

    Args:
        model: what is evaluated.
        step: trains on one batch.
        close: takes hooks and threads off.
        engine: the DeepSpeed engine, where there is one.
    """

    def __init__(
        self, model: torch.nn.Module, step: Callable[[Any], None], close: Callable[[], object], engine: Any = None
    ) -> None:
        self.model, self.step, self._close, self.engine = model, step, close, engine

    def close(self) -> None:
        """Free everything. Collective."""
        self._close()
        for param in self.model.parameters():  # engines and DDP stay in cycles with C++ objects: at least let go of what is large
            param.grad, param.data = None, param.data.new_empty(0)
        del self.model, self.step, self._close, self.engine
        gc.collect()


def make(name: str, workload: Workload, seed: int, plan: Path | None = None) -> Training:
    """Build the variant `name`; collective.

    Args:
        name: as in results: `deepspeed fp32`, `ddp powersgd 1`, ...; with a plan, any name.
        workload: model and optimizer.
        seed: of the model's first weights, alike for all.
        plan: plan.json, for a variant of ours.
    """
    torch.manual_seed(seed)
    model = workload.build(seed)
    if plan is not None:
        return _engine(model, workload, json.loads(plan.read_text()))
    if name.startswith("ddp"):
        return _ddp(model, workload, name.removeprefix("ddp").split())
    config = ds_config(workload)
    if name == "deepspeed bf16":
        config["communication_data_type"] = "bf16"
    elif name not in ("deepspeed fp32", BOUND):
        raise ValueError(f"no variant {name!r} without a plan")
    training = _engine(model, workload, config)
    if name == BOUND:
        engine = training.engine
        engine.buffered_allreduce_fallback = lambda *_, **__: engine._get_gradients_for_reduction()
    return training


def ds_config(workload: Workload) -> dict[str, Any]:
    """The DeepSpeed config that plans are made for."""
    return {"train_micro_batch_size_per_gpu": workload.batch_size, "zero_optimization": {"stage": 0}, "steps_per_print": 10**9}


def _engine(model: torch.nn.Module, workload: Workload, config: dict[str, Any]) -> Training:
    optimizer = workload.optimizer(model.parameters())
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def step(batch: Any) -> None:
        engine.backward(engine(batch))
        engine.step()

    def close() -> None:
        if hasattr(engine, "espresso"):
            vars(engine).pop("espresso").detach()
        optimizer.state.clear()
        engine.destroy()

    return Training(engine.module, step, close, engine)


def _ddp(model: torch.nn.Module, workload: Workload, words: list[str]) -> Training:
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    match words:
        case []:
            pass
        case ["fp16"]:
            ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)
        case ["bf16"]:
            ddp.register_comm_hook(None, _bf16_hook)
        case [*batched, "powersgd", rank] if batched in ([], ["batched"]):
            hook = powerSGD_hook.batched_powerSGD_hook if batched else powerSGD_hook.powerSGD_hook
            powerSGD_hook._orthogonalize = _orthogonalise_any
            ddp.register_comm_hook(_PowerSGDStates(model, int(rank)), _in_own_group(hook))
        case _:
            raise ValueError(f"no variant {' '.join(['ddp', *words])!r}")
    optimizer = workload.optimizer(model.parameters())

    def step(batch: Any) -> None:
        ddp(batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return Training(model, step, optimizer.state.clear)


_orthogonalise = powerSGD_hook._orthogonalize


def _orthogonalise_any(matrices: Tensor, epsilon: float = 0) -> None:
    """Mends the batched hook of torch 2.13, which gives one matrix where its own function wants a batch, and stops."""
    _orthogonalise(matrices if matrices.dim() == 3 else matrices.unsqueeze(0), epsilon)


class _PowerSGDStates:
    """A state of torch's hook for each bucket, with a process group of its own.

    The hook starts its later allreduces in callbacks, so over gloo those of several buckets leave in another order on another
    rank, and sums are mixed up or the run ends with an error. In a group of its own a bucket's follow each other.
    """

    def __init__(self, model: torch.nn.Module, rank: int) -> None:
        buckets = 2 + sum(param.nbytes for param in model.parameters()) // BUCKET_BYTES
        make = partial(powerSGD_hook.PowerSGDState, matrix_approximation_rank=rank, start_powerSGD_iter=POWERSGD_STARTS)
        self.of = [make(dist.new_group()) for _ in range(buckets)]


def _in_own_group(hook):  # noqa: ANN001 - as below
    def run(states, bucket):  # noqa: ANN001
        state = states.of[bucket.index()]
        future = hook(state, bucket)
        if not bucket.is_last():  # the hook counts steps when it sees the last bucket
            state.iter += 1
        return future

    return run


def _bf16_hook(state, bucket):  # noqa: ANN001 - DDP compares annotations, and by name refuses bf16 without NCCL
    """`bf16_compress_hook`, which works over gloo as well."""
    return default_hooks.bf16_compress_hook(state, bucket)


def free_gradients(training: Training) -> None:
    """Between its turns a variant needs no gradients; DDP's live in its buckets and stay."""
    for param in training.model.parameters():
        param.grad = None if training.engine is not None else param.grad


PEERS: dict[str, str] = {
    BOUND: "bound",
    "deepspeed fp32": "peer",
    "deepspeed bf16": "peer",
    "ddp": "peer",
    "ddp fp16": "peer",
    "ddp bf16": "peer",
    **{f"ddp powersgd {rank}": "peer" for rank in (1, 2, 4)},
    **{f"ddp batched powersgd {rank}": "peer" for rank in (1, 2, 4)},
}
"""Variants that need no plan, and their kinds."""

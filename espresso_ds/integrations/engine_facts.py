"""What we read from a DeepSpeed engine: parameters, settings that step times depend on, and whether a plan can be kept."""

from __future__ import annotations

import socket
from collections import Counter
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ..core.errors import MismatchError, UnsupportedError
from ..core.host_facts import this_host
from ..core.hosts import ClusterKind
from ..core.plan import Plan
from ..core.profile import model_fingerprint
from .deepspeed_version import unknown_deepspeed
from .settling import precision_of

NEEDED = (
    "buffered_allreduce_fallback",
    "is_gradient_accumulation_boundary",
    "_take_model_step",
    "was_step_applied",
    "_get_gradients_for_reduction",
    "zero_optimization_stage",
    "gradient_predivide_factor",
    "postscale_gradients",
)


def trainable(engine: Any) -> dict[str, torch.nn.Parameter]:
    """Name -> parameter, for all that DeepSpeed would reduce."""
    return {name: p for name, p in engine.module.named_parameters() if p.requires_grad and p.numel() > 0}


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def timing_config(engine: Any) -> dict[str, str | int | float | bool]:
    """Resolved settings that ready times, sizes on the wire or the meaning of a plan depend on."""
    return {
        "device": next(iter(trainable(engine).values())).device.type,
        "train_micro_batch_size_per_gpu": engine.train_micro_batch_size_per_gpu(),
        "gradient_accumulation_steps": engine.gradient_accumulation_steps(),
        "zero_stage": int(engine.zero_optimization_stage()),
        "precision": precision_of(engine),
        "communication_data_type": dtype_name(engine.communication_data_type),
    }


def check_supported(engine: Any, stages: int = 1) -> None:
    """Raise UnsupportedError naming the first thing about the engine under which a plan cannot be kept yet.

    Args:
        engine: for `stages` > 1 a PipelineEngine of so many.
        stages: of the plan. With several, `stage_facts` has checked ZeRO.
    """
    missing = [name for name in NEEDED if not callable(getattr(engine, name, None))]
    if missing:
        raise unknown_deepspeed(f"its engine has no {missing[0]}()")
    if stages == 1 and getattr(engine, "pipeline_parallelism", False):
        raise UnsupportedError(
            f'a plan without "pipeline" cannot be kept under a PipelineModule of {engine.num_stages} stages; plan for them, '
            "train without them, or run without the plan (ESPRESSO_DISABLE=1)"
        )
    stage = int(engine.zero_optimization_stage())
    faults = [
        (not trainable(engine), "a model without trainable parameters", "give the engine a model to train"),
        (stages == 1 and stage != 0, f"ZeRO stage {stage}", 'set "zero_optimization": {"stage": 0}'),
        (getattr(engine, "torch_autocast_z0_gradscaler", None) is not None, "torch_autocast with a gradient scaler", "use bf16"),
        (getattr(engine, "has_moe_layers", False), "mixture-of-experts layers", "train it without expert parallelism"),
        (engine.is_deepcompile_active(), "DeepCompile", 'set "compile": {"deepcompile": false}'),
        (
            engine.dp_world_size * stages != dist.get_world_size(),
            "tensor or model parallelism",
            "use data parallelism only",
        ),
        (getattr(engine, "sequence_parallel_size", 1) > 1, "sequence parallelism", "use data parallelism only"),
        (
            not (engine.pipeline_enable_backward_allreduce if stages > 1 else engine.enable_backward_allreduce),
            "backward allreduce switched off",
            "leave it to DeepSpeed",
        ),
        (
            not getattr(engine, "managed_gradient_accumulation", lambda: True)(),  # older DeepSpeeds always manage it
            "gradient accumulation that DeepSpeed does not manage",
            'remove "managed_gradient_accumulation"',
        ),
        (
            any(getattr(m, "sparse", False) for m in engine.module.modules()),
            "sparse embedding gradients",
            "build nn.Embedding with sparse=False",
        ),
    ]
    for present, what, fix in faults:
        if present:
            raise UnsupportedError(f"a plan cannot be kept under {what} yet; {fix}, or run without the plan (ESPRESSO_DISABLE=1)")


class Layout(NamedTuple):
    """Where the ranks are. `in_order`: those of a host follow each other."""

    nodes: int
    ranks_per_node: int
    in_order: bool


def layout() -> Layout:
    """Nodes and ranks per node of the running job, by hostname. Collective. Raises MismatchError on uneven hosts."""
    names = host_names()
    counts = Counter(names)
    if len(set(counts.values())) > 1:
        raise MismatchError(f"hosts have different numbers of ranks: {dict(counts)}; give each host the same number of slots")
    return Layout(len(counts), counts[names[0]], in_order=len(list(groupby(names))) == len(counts))


def host_names() -> list[str]:
    """The host of every rank. Collective."""
    names: list = [None] * dist.get_world_size()
    dist.all_gather_object(names, socket.gethostname())
    return names


def cluster_kind(engine: Any) -> ClusterKind:
    """What the running job's hosts are made of, as one rank of each tells. Collective, after `layout`, which checks the shape."""
    backend = _backend_on(next(iter(trainable(engine).values())).device.type)
    told: list = [None] * dist.get_world_size()
    dist.all_gather_object(told, this_host(socket.gethostname(), backend))
    slots = Counter(host.name for host in told)
    first = {host.name: host for host in reversed(told)}
    return ClusterKind.of(backend, [host.model_copy(update={"slots": slots[name]}) for name, host in first.items()])


def _backend_on(device: str) -> str:
    """The default group's backend for tensors on `device`: a group may have several, as in `cpu:gloo,cuda:nccl`."""
    by_device = dict(each.split(":") for each in dist.get_backend_config().split(","))
    return by_device.get(device, dist.get_backend())


def check_cluster(plan: Plan, here: ClusterKind, any_cluster: bool, where: str) -> None:
    """Raise MismatchError naming what differs between the cluster that was profiled for the plan and this one.

    A plan from before clusters were remembered holds on any, and every plan does where the user says so (`any_cluster`).
    """
    made = plan.made_for.cluster
    if made is None or any_cluster:
        return
    if different := made.differences(here):
        raise MismatchError(
            f"{where} was made for another kind of cluster than this run's: {'; '.join(different)}; measure this one with "
            "`espresso profile cluster` and plan again (`espresso prepare` does both), or train with the plan nevertheless: "
            'set "any_cluster": true in its "espresso" block'
        )


MEND = "make the plan for this run: `espresso prepare`"

Kind = tuple[tuple[int, ...], str]
"""Shape and dtype of a parameter."""


def check_made_for(plan: Plan, engine: Any, nodes: int, ranks_per_node: int, where: str) -> None:
    """Raise MismatchError naming what differs between the plan and this run, and the command that mends it."""
    check_job(plan, engine, nodes, ranks_per_node, where)
    here = kinds(trainable(engine))
    check_tensors(plan, here, where, "this model")
    found = model_fingerprint((name, *kind) for name, kind in here.items())
    if found != plan.made_for.model:
        raise MismatchError(f"{where} was made for a model with fingerprint {plan.made_for.model}, this one has {found}; {MEND}")


def check_job(plan: Plan, engine: Any, nodes: int, ranks_per_node: int, where: str) -> None:
    """Raise MismatchError where the plan was made for other hosts or settings than this run's."""
    made = plan.made_for
    if (made.nodes, made.ranks_per_node) != (nodes, ranks_per_node):
        raise MismatchError(
            f"{where} was made for {made.nodes} hosts x {made.ranks_per_node} ranks, "
            f"this run has {nodes} x {ranks_per_node}; {MEND}"
        )
    here = timing_config(engine)
    for key in sorted(made.config.keys() | here.keys()):
        if made.config.get(key) != here.get(key):
            raise MismatchError(f"{where} was made for {key} = {made.config.get(key)!r}, this run has {here.get(key)!r}; {MEND}")


def kinds(parameters: dict[str, torch.nn.Parameter]) -> dict[str, Kind]:
    """What a plan has to know of parameters."""
    return {name: (tuple(param.shape), dtype_name(param.dtype)) for name, param in parameters.items()}


def check_tensors(plan: Plan, here: dict[str, Kind], where: str, whose: str) -> None:
    """Raise MismatchError where the plan's tensors are not the parameters that are trained `here`; `whose` names their owner."""
    planned = {tensor.name: tensor for tensor in plan.tensors}
    for name, (shape, dtype) in here.items():
        if name not in planned:
            raise MismatchError(f"{where} has no decision for {name!r}, which {whose} trains; {MEND}")
        decided = planned[name]
        if (decided.shape, decided.dtype) != (shape, dtype):
            raise MismatchError(
                f"{where} was made for {name!r} of shape {list(decided.shape)} {decided.dtype}, "
                f"{whose} has {list(shape)} {dtype}; {MEND}"
            )
    if extra := next((name for name in planned if name not in here), None):
        raise MismatchError(f"{where} decides for {extra!r}, which {whose} does not train; {MEND}")

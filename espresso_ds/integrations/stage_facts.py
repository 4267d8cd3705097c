"""What we read from a PipelineEngine for a plan with stages: who trains what, where replicas are, whether it can be kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist

from ..core.errors import MismatchError, UnsupportedError
from ..core.plan import PipelineDecision, Plan
from ..runtime.paths import Place
from .engine_facts import MEND, Kind, Layout, check_supported, check_tensors, kinds, trainable
from .optimizer_gradients import OptimizerGradients, keeps_gradients
from .settling import precision_of

TIED = "tied_modules."
"""Where PipelineModule keeps layers of which several stages may have a copy."""


def untied(engine: Any) -> dict[str, torch.nn.Parameter]:
    """The parameters of this rank's stage that a plan decides for; their names are unique over all stages."""
    return {name: param for name, param in trainable(engine).items() if not name.startswith(TIED)}


def tied(engine: Any) -> dict[str, torch.nn.Parameter]:
    """Those that other stages may have a copy of: DeepSpeed adds up the gradients of the copies before those of the replicas."""
    return {name: param for name, param in trainable(engine).items() if name.startswith(TIED)}


def check_staged(engine: Any, plan: Plan, where: str) -> None:
    """Raise EspressoError naming the first thing about the engine under which a plan with stages cannot be kept."""
    decided = plan.pipeline
    assert decided is not None
    if not getattr(engine, "pipeline_parallelism", False):
        raise UnsupportedError(
            f"{where} is made for {decided.stages} pipeline stages, and the model is no PipelineModule; train one of "
            f"{decided.stages} stages, or plan for this model: `espresso prepare`"
        )
    for what, made, here in (
        ("pipeline stages", decided.stages, engine.num_stages),
        ("micro-batches", decided.micro_batches, engine.micro_batches),
        ("replicas of each stage", _replicas(plan, decided), engine.dp_world_size),
    ):
        if made != here:
            raise MismatchError(f"{where} was made for {made} {what}, this run has {here}; {MEND}")
    if plan.tensors:
        _check_gradients(engine, decided, where)


def _replicas(plan: Plan, decided: PipelineDecision) -> int | str:
    replicas, left = divmod(plan.made_for.world_size, decided.stages)
    return f"{plan.made_for.world_size}/{decided.stages}" if left else replicas


def _check_gradients(engine: Any, decided: PipelineDecision, where: str) -> None:
    if engine.dp_world_size == 1:
        raise MismatchError(f"{where} decides for gradients, but a stage has one replica, which shares them with none; {MEND}")
    stage = int(engine.zero_optimization_stage())
    if stage != 0 and not keeps_gradients(engine):
        raise UnsupportedError(
            f"gradients of a pipeline's replicas cannot be planned under ZeRO stage {stage} in {precision_of(engine)} yet, but "
            'in bf16 at stage 1 with "data_types": {"grad_accum_dtype": "fp32"}; set "zero_optimization": {"stage": 0}, or plan '
            "for the boundaries alone: `espresso plan` without --replicas"
        )
    kept = OptimizerGradients(engine)
    if left := next((name for name, param in trainable(engine).items() if kept.lacks(param)), None):
        raise UnsupportedError(
            f"{left} wants a gradient, but DeepSpeed's optimizer for bf16 has it in no group; give it "
            "to the optimizer, freeze it, or plan for the boundaries alone: `espresso plan` without --replicas"
        )
    check_supported(engine, decided.stages)


def told_by_all(engine: Any) -> list[tuple[int, dict[str, Kind]]]:
    """The stage of every rank, and what of it a plan decides for. Collective."""
    told: list = [None] * dist.get_world_size()
    dist.all_gather_object(told, (engine.stage_id, kinds(untied(engine))))
    return told


def check_stages(plan: Plan, told: Sequence[tuple[int, dict[str, Kind]]], where: str) -> None:
    """Raise MismatchError where the plan's tensors of a stage are not the parameters that a rank of the stage trains."""
    for rank, (stage, here) in enumerate(told):
        check_tensors(plan.of_stage(stage), here, f"{where}, stage {stage}", f"rank {rank}")


def stage_layout(hosts: Sequence[str]) -> Layout:
    """Where a stage's replicas are, from their hosts. Uneven hosts count as one, with ranks that are out of order: what is flat
    does not ask.
    """
    counts = Counter(hosts)
    if len(set(counts.values())) > 1:
        return Layout(1, len(hosts), in_order=False)
    return Layout(len(counts), counts[hosts[0]], in_order=len(list(groupby(hosts))) == len(counts))


def stage_place(layout: Layout, members: Sequence[int], rank: int) -> Place:
    """A rank of the job in the cluster that a stage's replicas make; for a rank of another stage, the stage's first."""
    return Place(layout.nodes, layout.ranks_per_node, members.index(rank) if rank in members else 0, tuple(members))

"""Attaching a plan with stages to a DeepSpeed PipelineEngine: boundaries, and gradients of each stage's replicas.

The replicas of a stage are a cluster of their own, which carries out its part of the plan as the whole job does a plan without
stages. Tied weights are in no plan: their gradients take DeepSpeed's way, once those of all stages are added up.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from ..core.errors import EspressoError, UnsupportedError
from ..core.option import Option
from ..core.plan import Plan
from ..core.run_trace import TRACE_ENV
from ..runtime import groups
from ..runtime.executor import Compressor
from ..runtime.low_rank import LowRankCompressor
from ..runtime.paths import Place
from ..runtime.synchroniser import Member
from ..runtime.trace import wanted_path
from .engine import Attachment, Planned, banner, check_options, compressor_of, hear_all, scaling_of
from .engine_facts import Layout, check_cluster, check_job, cluster_kind, host_names, layout, timing_config
from .guarding import guard_wanted, tell
from .last_backward import LastBackward
from .pipeline import PipelineAttachment, compress_boundaries, ways_of
from .plan_source import Source
from .stage_facts import check_staged, check_stages, stage_layout, stage_place, tied, told_by_all, untied


def attach_staged_plan(engine: Any, source: Source, fault: EspressoError | None) -> None:
    """Make a PipelineEngine carry out a plan with stages. Collective over all ranks.

    Args:
        engine: fresh from `deepspeed.initialize`.
        source: a plan with "pipeline".
        fault: why this rank has no usable plan, to be raised on all ranks.

    Raises:
        EspressoError: the same one on every rank: a bad plan, one made for something else, an unsupported engine, or ranks that
            disagree.
    """
    plan, where = source.plan, source.where
    assert plan.pipeline is not None
    control, agreement = hear_all(source, fault, functools.partial(check_staged, engine, plan, where))
    hosts, names, kind, told = layout(), host_names(), cluster_kind(engine), told_by_all(engine)
    with agreement.collecting():
        wanted = guard_wanted(source.block.guard)
        if wanted_path(0) is not None:
            raise UnsupportedError(f"{TRACE_ENV}: a run trace of a pipeline cannot be written yet; unset it")
        check_job(plan, engine, hosts.nodes, hosts.ranks_per_node, where)
        check_cluster(plan, kind, source.block.any_cluster, where)
        found, numbers = ways_of(engine, plan.pipeline.settings)
        if plan.tensors:
            check_stages(plan, told, where)
        compressors = [compressor_of(settings, engine) for settings in plan.compressors]
        layouts = [stage_layout([names[rank] for rank in members]) for members in engine.grid.dp_groups]
        for members, own in zip(engine.grid.dp_groups, layouts, strict=True):
            check_options(plan.of_stage(told[members[0]][0]), compressors, timing_config(engine)["device"], own)
    items = {"plan seal": plan.seal, "timeout_s": str(source.block.timeout_s), "scaling": str(scaling_of(engine))}
    agreement.settle(items | {key: str(value) for key, value in timing_config(engine).items()})
    boundaries = compress_boundaries(engine, plan.pipeline.settings, found, numbers, source.block.timeout_s, control)
    engine.espresso = StagedAttachment(engine, source, boundaries, compressors, layouts)
    if plan.tensors:
        gradients = engine.espresso.gradients
        tell(banner(source, 0 if gradients is None else gradients.buffer_nbytes))
        if wanted:
            tell("guard: off, a plan with pipeline stages is not measured against uncompressed gradients")


class StagedAttachment:
    """What `engine.espresso` holds under a plan with stages; `detach` takes it off.

    `boundaries` are the channels to other stages, `gradients` what this stage's replicas share: None where nothing is planned.

    Args:
        engine: a PipelineEngine for which the plan was checked.
        source: the plan and the block it stands in.
        boundaries: at work.
        compressors: one for each of the plan's.
        layouts: where the replicas of each stage are, in the order of the engine's data-parallel groups.
    """

    def __init__(
        self,
        engine: Any,
        source: Source,
        boundaries: PipelineAttachment,
        compressors: Sequence[Compressor | LowRankCompressor],
        layouts: Sequence[Layout],
    ) -> None:
        self.boundaries = boundaries
        self.gradients: Attachment | None = None
        self._last: LastBackward | None = None
        clusters = [stage_place(*each, dist.get_rank()) for each in zip(layouts, engine.grid.dp_groups, strict=True)]
        place = next(place for place in clusters if dist.get_rank() in place.members)
        options = {Option.parse(tensor.option) for tensor in source.plan.tensors}
        shared = groups.make(place, options, dist.get_backend(), source.block.timeout_s, clusters)
        plan = _for_replicas(source.plan.of_stage(engine.stage_id), place)
        if not plan.tensors:
            shared.close()
            return
        planned = Planned(plan, untied(engine), shared)
        self._stock = engine.buffered_allreduce_fallback
        self._last = LastBackward(engine, self._begin)
        self.gradients = Attachment(engine, source, planned, compressors, synchronises=self._last.completes)
        kept = self.gradients.kept
        self._alone = [Member(name, param, held=kept.of(param)) for name, param in tied(engine).items()]
        self._flush = engine.buffered_allreduce_fallback
        engine.buffered_allreduce_fallback = self._reduce

    def detach(self) -> None:
        """Give the engine back as it was. On all ranks, between steps."""
        if self._last is not None and self.gradients is not None:
            self._last.close()
            self.gradients.detach()
            self._last = None
        self.boundaries.detach()

    def _begin(self) -> None:
        assert self.gradients is not None
        self.gradients.synchroniser.begin()

    def _reduce(self, grads: object = None, **kwargs: Any) -> None:
        """In place of the engine's allreduce, after it has added up the copies of tied weights."""
        self._flush(grads, **kwargs)
        if self._alone:
            self._stock(grads=[member.gradient() for member in self._alone], **kwargs)


def _for_replicas(plan: Plan, place: Place) -> Plan:
    """A stage's plan as one for a cluster of its replicas alone."""
    made_for = plan.made_for.model_copy(update={"nodes": place.nodes, "ranks_per_node": place.ranks_per_node})
    return plan.model_copy(update={"made_for": made_for})

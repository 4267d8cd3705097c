"""From profiles to the plan of a pipeline: its boundaries, and the gradients of each stage's replicas."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.config import EspressoBlock, PipelineSettings
from ..core.errors import FileError, MismatchError
from ..core.plan import PipelineDecision, Plan, Prediction, TensorDecision
from ..core.profile import ClusterProfile, CompressorProfile, ModelTrace
from .build import WORTHWHILE, made_for, make_plan
from .cost import Costs
from .pipeline import AS_IT_IS, Pair, Pipeline, best, candidates, pairs_of, reasons, settings_of


def make_pipeline_plan(
    trace: ModelTrace,
    cluster: ClusterProfile,
    compressors: CompressorProfile,
    *,
    made_by: str,
    block: EspressoBlock,
    uncompressed: bool = False,
    replicas: ClusterProfile | None = None,
) -> Plan:
    """Decide for every boundary, and for every gradient where replicas' links are known, and predict the step.

    Args:
        trace: of a PipelineModule.
        cluster: links of the whole job's hosts.
        compressors: codecs that boundaries and gradients may get.
        made_by: program and version, for people.
        block: constraints and thrift, and what its "pipeline" says beside codecs.
        uncompressed: send everything as it is.
        replicas: routines between as many ranks as a stage has replicas, placed as these are. None leaves gradients to DeepSpeed.

    Returns:
        The sealed plan; `pipeline.why` says what was decided and left.

    Raises:
        FileError: the trace is of no pipeline, "pipeline" of the block names codecs itself, or something was not measured.
        MismatchError: trace and profiles are of different worlds.
    """
    given = block.pipeline or PipelineSettings()
    if trace.pipeline is None:
        raise FileError("model trace: is of no PipelineModule; plan it as any other model")
    if given.forward or given.backward or given.boundaries or given.shared_indices:
        raise FileError(
            'espresso: "pipeline" names codecs of its own, and the planner is to choose them; remove "forward", "backward", '
            '"boundaries" and "shared_indices" from it, or train without a plan: then it is done as it says'
        )
    stages = len(trace.pipeline.stages)
    count = trace.world_size // stages
    if (cluster.world_size, cluster.ranks_per_node) != (trace.world_size, trace.ranks_per_node):
        raise MismatchError(
            f"the pipeline was traced with {trace.world_size} ranks ({trace.ranks_per_node} per node), the cluster profile is of "
            f"{cluster.world_size} ({cluster.ranks_per_node}); take the wrong one again with the hostfile of the training"
        )
    if replicas is not None and replicas.world_size != count:
        raise MismatchError(
            f"a stage has {count} replicas, the profile of their links is of {replicas.world_size} ranks; measure it with {count}"
        )
    pipeline = Pipeline(trace.pipeline, cluster, Costs(cluster, compressors, trace.wire_dtype), given.per_example)
    pairs: list[Pair] = [(AS_IT_IS, AS_IT_IS)] * (stages - 1)
    plain = pairs
    if not uncompressed:
        pairs = best(pipeline, _menu(compressors, block, given), WORTHWHILE, block.thrift)
    why = [f"boundary {number}: {text}" for number, text in enumerate(reasons(pipeline, pairs))]
    plans: list[Plan] = []
    if count > 1 and replicas is not None:
        begun = [start for start, _ in pipeline.played(pairs).last_backward]
        each = [_of_stage(trace, stage, begun[stage], replicas) for stage in range(stages)]
        plans = [_stage_plan(one, replicas, compressors, made_by, block, uncompressed) for one in each]
    elif count > 1:
        why.append(
            f"gradients of {count} replicas: left to DeepSpeed, uncompressed after backward and not in the predicted step, since "
            "their links were not measured"
        )
    planned_wait = [plan.predicted.planned_s - plan.predicted.compute_s for plan in plans]
    stock_wait = [plan.predicted.stock_s - plan.predicted.compute_s for plan in plans]
    plain_wait = [plan.predicted.uncompressed_s - plan.predicted.compute_s for plan in plans]
    planned_s = pipeline.played(pairs, planned_wait).step_s
    predicted = Prediction(
        compute_s=pipeline.compute_s(),
        stock_s=pipeline.stock_s(stock_wait),
        uncompressed_s=pipeline.played(plain, plain_wait).step_s,
        planned_s=planned_s,
        uncompressed_bytes=pipeline.sent_bytes(plain) + max((plan.predicted.uncompressed_bytes for plan in plans), default=0),
        planned_bytes=pipeline.sent_bytes(pairs) + max((plan.predicted.planned_bytes for plan in plans), default=0),
        lower_bound_s=min(planned_s, pipeline.compute_s()),
        free_compression_s=min(planned_s, pipeline.played(pairs, free=True).step_s),
    )
    fingerprints = {"trace": trace.fingerprint, "cluster": cluster.fingerprint, "compressors": compressors.fingerprint}
    return Plan(
        made_by=made_by,
        made_for=made_for(trace, cluster),
        profiles=fingerprints | ({} if replicas is None else {"replicas": replicas.fingerprint}),
        compressors=tuple(codec.compressor for codec in compressors.codecs),
        predicted=predicted,
        tensors=tuple(_numbered(plans)),
        pipeline=PipelineDecision(
            stages=stages,
            micro_batches=trace.pipeline.micro_batches,
            settings=settings_of(pairs, given),
            tensors=tuple(len(plan.tensors) for plan in plans) or (0,) * stages,
            why=tuple(why),
        ),
    ).sealed()


def _menu(compressors: CompressorProfile, block: EspressoBlock, given: PipelineSettings) -> list[Pair]:
    """What a boundary may have. Raises FileError where that is nothing but to send all as it is."""
    limits, codecs = block.constraints, compressors.codecs
    density = limits.boundary_aqsgd_density if given.feedback == "aqsgd" else limits.boundary_density
    forward = candidates(codecs, density, given.feedback)
    backward = candidates(codecs, limits.boundary_density)
    if forward == backward == [AS_IT_IS]:
        raise FileError(
            f"compressor profile: none of {', '.join(codec.compressor.label for codec in codecs)} may cross between pipeline "
            f'stages (TopK keeps at least "boundary_density" {density:g} there, signs lose the scale); profile others too, such '
            "as --alternative quantize:bits=8, or plan with --uncompressed"
        )
    return pairs_of(forward, backward, limits.milder_backward)


def _of_stage(trace: ModelTrace, stage: int, begun_s: float, replicas: ClusterProfile) -> ModelTrace:
    """One stage as a model of its own, whose backward is that of the last micro-batch."""
    assert trace.pipeline is not None
    own = trace.pipeline.stages[stage]
    start = sum(each.tensors for each in trace.pipeline.stages[:stage])
    update = {
        "world_size": replicas.world_size,
        "ranks_per_node": replicas.ranks_per_node,
        "forward_s": begun_s,
        "backward_s": own.backward_s,
        "after_s": own.after_s,
        "tensors": trace.tensors[start : start + own.tensors],
        "pipeline": None,
    }
    return trace.model_copy(update=update)


def _stage_plan(
    trace: ModelTrace, replicas: ClusterProfile, compressors: CompressorProfile, made_by: str, block: EspressoBlock, plain: bool
) -> Plan:
    return make_plan(
        trace,
        replicas,
        compressors,
        made_by=made_by,
        uncompressed=plain,
        thrift=block.thrift,
        constraints=block.constraints,
        error_budget=block.error_budget,
    )


def _numbered(plans: Sequence[Plan]) -> list[TensorDecision]:
    """The tensors of all stages, their units counted on."""
    found: list[TensorDecision] = []
    for plan in plans:
        first = found[-1].unit + 1 if found else 0
        found += [tensor.model_copy(update={"unit": tensor.unit + first}) for tensor in plan.tensors]
    return found

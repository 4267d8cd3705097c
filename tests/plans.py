"""Plans made by hand for small models, without profiles."""

from math import prod

from espresso_ds.core.config import CompressorSettings, EspressoBlock, GuardSettings
from espresso_ds.core.plan import BLOCK, MadeFor, PipelineDecision, Plan, Prediction, TensorDecision
from espresso_ds.core.profile import model_fingerprint

PREDICTION = Prediction(
    compute_s=1,
    stock_s=4,
    uncompressed_s=3,
    planned_s=2,
    uncompressed_bytes=100,
    planned_bytes=10,
    lower_bound_s=1.5,
    free_compression_s=1.6,
)
IDENTITY = CompressorSettings(name="identity")


def plan_for(model, config, *, nodes=1, ranks=2, option="AR.flat", compressors=(IDENTITY,), fuse=1, dtype="float32") -> Plan:
    """A sealed plan for all trainable parameters, last first, `fuse` of them in a unit; units take the compressors in turn."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad][::-1]
    return Plan(
        made_by="tests",
        made_for=MadeFor(
            nodes=nodes,
            ranks_per_node=ranks // nodes,
            model=model_fingerprint((name, tuple(p.shape), dtype) for name, p in named),
            config=config,
        ),
        profiles={},
        compressors=compressors,
        predicted=PREDICTION,
        tensors=tuple(decisions([(name, tuple(p.shape)) for name, p in named], option, len(compressors), fuse, dtype)),
    ).sealed()


def decisions(named, option, codecs=1, fuse=1, dtype="float32", first=0) -> list[TensorDecision]:
    """One for each (name, shape), `fuse` of them in a unit, the first of which is `first`; units take the codecs in turn."""
    return [
        TensorDecision(
            name=name,
            shape=shape,
            dtype=dtype,
            numel=prod(shape),
            option=option,
            codec=number // fuse % codecs,
            unit=first + number // fuse,
        )
        for number, (name, shape) in enumerate(named)
    ]


def staged_plan(
    stages,
    micro_batches,
    settings,
    config,
    *,
    nodes=1,
    ranks=4,
    option="AR.flat",
    compressors=(IDENTITY,),
    fuse=1,
    dtype="float32",
) -> Plan:
    """A sealed plan for a pipeline: `stages` lists the (name, shape) of each stage's parameters."""
    found: list[TensorDecision] = []
    for named in stages:
        found += decisions(named[::-1], option, len(compressors), fuse, dtype, first=found[-1].unit + 1 if found else 0)
    return Plan(
        made_by="tests",
        made_for=MadeFor(nodes=nodes, ranks_per_node=ranks // nodes, model="", config=config),
        profiles={},
        compressors=compressors,
        predicted=PREDICTION,
        tensors=tuple(found),
        pipeline=PipelineDecision(
            stages=len(stages), micro_batches=micro_batches, settings=settings, tensors=tuple(map(len, stages))
        ),
    ).sealed()


def with_plan(ds_config, plan, **block) -> dict:
    """The DeepSpeed config with the plan in its espresso block, as JSON would give it. No guard, unless one is asked for: what it
    drops depends on times.
    """
    first, *others = plan.compressors
    block = {"guard": GuardSettings(enabled=False), **block}
    written = EspressoBlock(compressor=first, alternatives=others, plan=plan.model_dump(mode="json"), **block)
    return {**ds_config, BLOCK: written.model_dump(mode="json", exclude_none=True)}

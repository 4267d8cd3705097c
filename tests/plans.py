"""Plans made by hand for small models, without profiles."""

from espresso_ds.core.config import CompressorSettings, EspressoBlock, GuardSettings
from espresso_ds.core.plan import BLOCK, MadeFor, Plan, Prediction, TensorDecision
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
        tensors=tuple(
            TensorDecision(
                name=name,
                shape=tuple(p.shape),
                dtype=dtype,
                numel=p.numel(),
                option=option,
                codec=number // fuse % len(compressors),
                unit=number // fuse,
            )
            for number, (name, p) in enumerate(named)
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

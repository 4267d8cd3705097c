"""One rank of the tests of plans with stages: 2 stages x 2 replicas, every case in one process. Every rank writes what it saw.

torchrun --nproc-per-node 4 staged_worker.py FOLDER
"""

import contextlib
import gc
import hashlib
import io
import json
import os
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from pipeline_worker import BATCH, BITS, IDENTITY, TOPK, WIDTH, ZERO1, Plain, Two, batches, loss
from plans import plan_for, staged_plan, with_plan

from espresso_ds.core.config import CompressorSettings, GuardSettings, PipelineSettings
from espresso_ds.core.errors import EspressoError
from espresso_ds.core.plan import BLOCK, save_plan_file
from espresso_ds.integrations import engine_facts
from espresso_ds.integrations.engine_facts import timing_config
from espresso_ds.integrations.plan_source import HASH_ENV, PATH_ENV, from_config

STAGES, RANKS, STEPS = 2, 4, 3
GATHERED, DIVIDED = "C.cpu AG.flat D.cpu", "C.cpu A2A.flat D.cpu C.cpu AG.flat D.cpu"
EIGHT_BITS = CompressorSettings(name="quantize", bits=8, feedback="ef", seed=3)
SIGNS = CompressorSettings(name="efsignsgd")
BF16 = {"bf16": {"enabled": True}}
ASKED = {}
"""What engines have told, by config and model."""
SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}


class Tied(torch.nn.Module):
    """First and last layer share the weight."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(WIDTH, WIDTH) / 5)

    def forward(self, x):
        return torch.tanh(x @ self.weight)


class Alone(Tied):
    """As before, with one layer between: the last stage has a copy and nothing else, so nothing is planned for it."""


def layers(kind):
    if not issubclass(kind, Tied):
        return [LayerSpec(kind) for _ in range(4)]
    ends = [TiedLayerSpec("ends", kind)]
    return [*ends, *(LayerSpec(Plain) for _ in range(1 if kind is Alone else 4)), *ends]


def config_for(micro_batches, **changes):
    return {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": micro_batches,
        "steps_per_print": 10**9,
        "optimizer": {"type": "SGD", "params": {"lr": 0.2, "momentum": 0.5}},
        **changes,
    }


def engine_for(config, kind=Plain, checkpointed=0, but=0):
    """`but`: the optimizer does not get so many of the parameters."""
    torch.manual_seed(0)
    module = PipelineModule(layers(kind), num_stages=STAGES, loss_fn=loss, activation_checkpoint_interval=checkpointed)
    return deepspeed.initialize(model=module, config=config, model_parameters=list(module.parameters())[but:])[0]


@contextlib.contextmanager
def passing_engine(config, **model):
    """An engine, and nothing of it afterwards: DeepSpeed leaves its groups, and with hundreds of them all gets slow."""
    before = set(groups())
    engine = engine_for(config, **model)
    yield engine
    engine.destroy()
    dist.barrier()
    for group in groups():
        if group not in before:
            dist.destroy_process_group(group)


def groups():
    """All that this rank is a member of, in the order in which they were made."""
    return list(dist.distributed_c10d._world.pg_map)


def asked(config, **model):
    """What a plan for this config must say, of an engine without a plan: `facts`."""
    key = repr((config, model))
    if key not in ASKED:
        with passing_engine(config, **model) as engine:
            ASKED[key] = facts(engine)
    return ASKED[key]


def facts(engine):
    """The (name, shape) of each stage's parameters that a plan decides for, and what it must be made for."""
    mine = [(name, tuple(p.shape)) for name, p in engine.module.named_parameters() if not name.startswith("tied_modules.")]
    told = [None] * dist.get_world_size()
    dist.all_gather_object(told, (engine.stage_id, mine))
    stages = [next(named for stage, named in told if stage == number) for number in range(STAGES)]
    return stages, timing_config(engine)


def planned(config, settings=None, boundaries_only=False, model=None, guard=False, **plan):
    """The config with a plan for its gradients, or for its boundaries alone."""
    stages, made_for = asked(config, **(model or {}))
    if boundaries_only:
        stages = [[] for _ in stages]
    settings, micro_batches = PipelineSettings(**(settings or {})), config["gradient_accumulation_steps"]
    dtype = "bfloat16" if "bf16" in config else "float32"
    made = staged_plan(stages, micro_batches, settings, made_for, ranks=RANKS, dtype=dtype, **plan)
    return with_plan(config, made, timeout_s=60, guard=GuardSettings(enabled=guard))


def trained(config, steps=STEPS, again=False, **model):
    """Losses, hashes of all weights and of tied ones, and how many gradients were ready early. `again`: on the same batch."""
    with passing_engine(config, **model) as engine:
        if BLOCK not in config:
            ASKED[repr((config, model))] = facts(engine)
        return results(engine, "bf16" in config, steps, again)


def results(engine, half, steps, again):
    attached = getattr(engine, "espresso", None)
    ready = []
    if getattr(attached, "gradients", None) is not None:
        own = attached.gradients.synchroniser
        original = own.ready
        own.ready = lambda name: (ready.append(name), original(name))
    replica, micro_batches = engine.grid.get_data_parallel_id(), engine.micro_batches
    dtype = torch.bfloat16 if half else torch.float32
    losses = []
    for step in range(steps):
        losses.append(engine.train_batch(batches(micro_batches, replica if again else 10 * step + replica, dtype)).item())
    losses.append(engine.eval_batch(batches(micro_batches, 999 + replica, dtype)).item())
    tied = {name: p for name, p in engine.module.named_parameters() if name.startswith("tied_modules.")}
    told = {"stage": engine.stage_id, "losses": losses, "ready": len(ready), "hash": digest(engine.module.state_dict())}
    told |= {"tied": digest(tied), "trained": len(list(engine.module.parameters()))}
    if attached is not None:
        vars(engine).pop("espresso").detach()
        told["left"] = [name for name in ("_INSTRUCTION_MAP", "_exec_schedule", "_take_model_step") if name in vars(engine)]
    return told


def digest(tensors):
    data = b"".join(tensors[name].detach().float().numpy().tobytes() for name in sorted(tensors))
    return hashlib.sha256(data).hexdigest()


def by_launcher(folder, config, block_of_script=None, **model):
    """The same where the plan comes in a file that the environment names, and the script's config has none."""
    source = from_config(config, "test")
    path = folder / "plan.json"
    if dist.get_rank() == 0:
        save_plan_file(path, {key: value for key, value in config.items() if key != BLOCK}, source.block, source.plan)
    dist.barrier()
    os.environ[PATH_ENV] = str(path)
    os.environ.pop(HASH_ENV, None)
    try:
        bare = {key: value for key, value in config.items() if key != BLOCK}
        return trained({**bare, BLOCK: block_of_script} if block_of_script is not None else bare, **model)
    finally:
        del os.environ[PATH_ENV]


def said(config):
    """What rank 0 tells people at the start of training."""
    with contextlib.redirect_stderr(io.StringIO()) as told:
        trained(config, steps=1)
    return told.getvalue()


@contextlib.contextmanager
def hosts(names):
    """Ranks on so many hosts, as far as we ask."""
    engine_facts.socket = SimpleNamespace(gethostname=lambda: names[dist.get_rank()])
    try:
        yield
    finally:
        engine_facts.socket = socket


def failure(attempt, *args, **kwargs):
    """The message with which it stops at start."""
    try:
        attempt(*args, **kwargs)
    except EspressoError as error:
        return str(error)
    return "no error"


def changed(config, **changes):
    """The config with another plan, sealed again. A key of "pipeline" changes the plan's pipeline."""
    plan = from_config(config, "test").plan
    pipeline = plan.pipeline.model_copy(update=changes.pop("pipeline", {}))
    return with_plan(config, plan.model_copy(update={"pipeline": pipeline, **changes}).sealed(), timeout_s=60)


def equal():
    """Cases of which each is (stock, under the plan)."""
    cases = {
        "1 micro-batch": (config_for(1), {}, {}),
        "3 micro-batches": (config_for(3), {}, {"fuse": 3}),
        "clipping": (config_for(2, gradient_clipping=0.1), {}, {}),
        "predivide": (config_for(2, gradient_predivide_factor=4.0), {}, {}),
        "reduce-scatter": (config_for(2), {}, {"option": "RS.flat AG.flat", "fuse": 5}),
        "hierarchical": (config_for(2), {}, {"option": "RS.intra AR.inter AG.intra"}),
        "identity codec": (config_for(2), {}, {"option": DIVIDED}),
        "checkpointed": (config_for(2), {"checkpointed": 1}, {}),
        "two tensors": (config_for(2), {"kind": Two}, {}),
        "tied": (config_for(3), {"kind": Tied}, {"fuse": 2}),
        "nothing but a tied copy": (config_for(2), {"kind": Alone}, {}),
        "lossless boundaries": (config_for(2), {}, {"settings": {"forward": IDENTITY, "backward": IDENTITY}}),
        "bf16": (config_for(3, **BF16), {}, {"fuse": 3}),
        "bf16, each alone": (config_for(2, **BF16), {}, {}),
        "bf16, added at once": (config_for(2, bf16={"enabled": True, "immediate_grad_update": True}), {}, {"fuse": 2}),
        "bf16, clipping": (config_for(2, gradient_clipping=0.1, **BF16), {}, {"option": "RS.flat AG.flat", "fuse": 5}),
        "bf16, checkpointed": (config_for(2, **BF16), {"checkpointed": 1}, {}),
        "bf16, two tensors": (config_for(2, **BF16), {"kind": Two}, {}),
        "bf16, tied": (config_for(3, **BF16), {"kind": Tied}, {"fuse": 2}),
        "ZeRO 1, bf16, fp32 sums": (config_for(3, **ZERO1, **BF16, **SUMS), {}, {"fuse": 3}),
        "ZeRO 1, bf16, fp32 sums, tied": (config_for(2, **ZERO1, **BF16, **SUMS), {"kind": Tied}, {}),
        "ZeRO 1, boundaries": (config_for(2, **ZERO1), {}, {"boundaries_only": True}),
        "ZeRO 1, bf16, boundaries": (config_for(2, **ZERO1, **BF16), {}, {"boundaries_only": True}),
        "boundaries only, tied": (config_for(2), {"kind": Tied}, {"boundaries_only": True}),
    }
    found = {}
    for name, (config, model, plan) in cases.items():
        found[name] = trained(config, **model), trained(planned(config, model=model, **plan), **model)
    for name, changes in (("ZeRO 1, block", ZERO1), ("ZeRO 1, bf16, block", {**ZERO1, **BF16})):
        config = config_for(2, **changes)
        block = {"pipeline": {"forward": IDENTITY, "backward": IDENTITY}, "timeout_s": 60}
        found[name] = trained(config), trained({**config, BLOCK: block})
    with hosts("abab"):  # each replica of a stage on a host of its own
        found["two hosts"] = trained(tied := config_for(2)), trained(planned(tied, nodes=2, option="RS.intra AR.inter AG.intra"))
    found["tied, block"] = trained(tied, kind=Tied), trained({**tied, BLOCK: {"pipeline": {}, "timeout_s": 60}}, kind=Tied)
    return found


def compressed(folder):
    """What is compressed both ways at once."""
    both = {"forward": {**TOPK, "feedback": "ef21"}, "backward": BITS}
    few, config, half = dict(steps=12, again=True), config_for(2), config_for(2, **BF16, **ZERO1, **SUMS)
    bits = {"option": GATHERED, "compressors": (EIGHT_BITS,), "fuse": 2, "settings": both}
    signs = {"option": GATHERED, "compressors": (SIGNS,), "settings": both}
    tied = {"kind": Tied}
    return {
        "none": trained(config, **few),
        "8 bits": trained(planned(config, **bits), **few),
        "8 bits, by the launcher": by_launcher(folder, planned(config, **bits), **few),
        "signs": trained(planned(config, **signs), **few),
        "bf16, none": trained(half, **few),
        "bf16, 8 bits": trained(planned(half, **bits), **few),
        "tied, none": trained(config, **few, **tied),
        "tied, 8 bits": trained(planned(config, model=tied, **bits), **few, **tied),
    }


def failure_without_stages():
    """A plan with stages for a model that has none. First of all cases: after a pipeline DeepSpeed takes no other model."""
    plan = staged_plan([[("0.weight", (4, 4))], [("1.weight", (4, 4))]], 2, PipelineSettings(), {}, ranks=RANKS)
    return failure(deepspeed.initialize, model=torch.nn.Linear(4, 4), config=with_plan(config_for(2), plan, timeout_s=60))


def failures(folder):
    config = config_for(2)
    good = planned(config)
    plan = from_config(good, "test").plan
    flat = plan_for(torch.nn.Linear(4, 4), asked(config)[1], ranks=RANKS)
    renamed = plan.tensors[0].model_copy(update={"name": "9.weight"})
    gradients = {"tensors": plan.tensors, "pipeline": {"tensors": plan.pipeline.tensors}}
    zero, half = config_for(2, **ZERO1), config_for(2, **ZERO1, **BF16)
    tell = {
        "plan without stages": failure(trained, with_plan(config, flat)),
        "stages": failure(trained, changed(good, pipeline={"stages": 4, "tensors": (len(plan.tensors), 0, 0, 0)})),
        "micro-batches": failure(trained, changed(good, pipeline={"micro_batches": 5})),
        "replicas": failure(trained, changed(good, made_for=plan.made_for.model_copy(update={"ranks_per_node": 2 * RANKS}))),
        "tensors of another stage": failure(trained, changed(good, pipeline={"tensors": (1, len(plan.tensors) - 1)})),
        "another tensor": failure(trained, changed(good, tensors=(renamed, *plan.tensors[1:]))),
        "ZeRO 1": failure(trained, changed(planned(zero, boundaries_only=True), **gradients)),
        "ZeRO 1, bf16": failure(trained, changed(planned(half, boundaries_only=True), **gradients)),
        "bf16, not in the optimizer": failure(trained, planned(config_for(2, **BF16)), but=1),
        "pipeline beside the plan": failure(trained, {**good, BLOCK: {**good[BLOCK], "pipeline": {}}}),
        "pipeline beside the launcher's plan": failure(by_launcher, folder, good, {"pipeline": {}}),
        "boundary": failure(trained, planned(config, {"boundaries": {"1": {"forward": TOPK}}})),
        "ranks differ": failure(trained, good if dist.get_rank() else with_plan(config, flat)),
    }
    return tell


def main():
    folder = Path(sys.argv[1])
    gc.freeze()  # BF16_Optimizer collects garbage four times, which takes a second where all imports are looked at
    deepspeed.init_distributed(dist_backend="gloo")
    without_stages = failure_without_stages()
    told = {"equal": equal(), "compressed": compressed(folder), "failures": failures(folder)}
    told["said"] = said(planned(config_for(2), option=GATHERED, compressors=(EIGHT_BITS,), guard=True))
    told["failures"]["no PipelineModule"] = without_stages
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(told))
    dist.barrier()
    os._exit(0)  # gloo's threads may abort the interpreter's end


if __name__ == "__main__":
    main()

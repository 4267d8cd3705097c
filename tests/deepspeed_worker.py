"""One rank of the DeepSpeed tests: runs every case in one process, since importing DeepSpeed takes seconds. Rank 0 writes JSON.

torchrun --nproc-per-node 2 deepspeed_worker.py OUT.json
"""

import contextlib
import io
import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import pytest
import torch
import torch.distributed as dist
from any_cpu import allow_fp16
from plans import IDENTITY, plan_for, with_plan

from espresso_ds.compressors.topk import TopK
from espresso_ds.core.config import CompressorSettings, GuardSettings
from espresso_ds.core.errors import EspressoError
from espresso_ds.core.run_trace import Mark, RunTrace
from espresso_ds.integrations import engine_facts
from espresso_ds.integrations.engine_facts import cluster_kind, timing_config
from espresso_ds.runtime.plain import Plain

STEPS = 20
WIDTH = 48
DIVIDED = "C.cpu A2A.flat D.cpu C.cpu AG.flat D.cpu"
NESTED = "C.cpu A2A.intra A2A.inter D.cpu C.cpu AG.inter AG.intra D.cpu"
ROOTED = "RD.intra C.cpu GA.inter D.cpu C.cpu BC.inter D.cpu BC.intra"
FED, BARE = (CompressorSettings(name="identity", feedback=mode, seed=5) for mode in ("ef", "none"))
TOPK, BARE_BF16 = CompressorSettings(name="topk", density=0.1, feedback="ef"), CompressorSettings(name="bf16", feedback="none")


MAJORITY = CompressorSettings(name="signsgd")


def shape():
    """Hosts of two ranks each, as `main` makes them believe."""
    return {"nodes": dist.get_world_size() // 2, "ranks": dist.get_world_size()}


class Net(torch.nn.Module):
    """Layers used in different ways: always, on odd steps only, on rank 1 only, never; one weight is used twice."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(WIDTH, WIDTH)
        self.twice = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        self.odd = torch.nn.Linear(WIDTH, WIDTH)
        self.other_rank = torch.nn.Linear(WIDTH, WIDTH)
        self.never = torch.nn.Linear(WIDTH, 3)
        self.last = torch.nn.Linear(WIDTH, 4)
        self.frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x, step):
        x = torch.relu(self.first(x))
        x = torch.tanh(self.twice(self.twice(x)))
        if step % 2:
            x = self.odd(x)
        if dist.get_rank() == 1:
            x = self.other_rank(x)
        return self.last(x)


def ds_config(**changes):
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": 0},
        "steps_per_print": 10**6,
        **changes,
    }


def engine_for(config, optimizer=torch.optim.AdamW):
    torch.manual_seed(0)
    model = Net()
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer([p for p in model.parameters() if p.requires_grad], lr=1e-2), config=config
    )
    return engine


def train(engine, steps=STEPS, first=0):
    """Losses and a checksum of the weights. With fp16 every fifth loss is so large that gradients overflow."""
    generator = torch.Generator().manual_seed(dist.get_rank() + 1 + 100 * first)
    dtype = next(engine.module.parameters()).dtype
    losses = []
    for step in range(steps):
        for _ in range(engine.gradient_accumulation_steps()):
            x = torch.randn(4, WIDTH, generator=generator)
            y = torch.randint(0, 4, (4,), generator=generator)
            loss = torch.nn.functional.cross_entropy(engine(x.to(dtype), step).float(), y)
            engine.backward(loss * 1e9 if dtype is torch.float16 and (first + step) % 5 == 3 else loss)
            engine.step()
        losses.append(loss.item())
    checksum = sum(p.double().sum().item() for p in engine.module.parameters())
    return losses, checksum


def stock(config, **arguments):
    return train(engine_for(config, **arguments))


def planned(config, plan_arguments, **arguments):
    engine = planned_engine(config, plan_arguments, **arguments)
    try:
        return train(engine)
    finally:
        engine.espresso.detach()


def planned_engine(config, plan_arguments, guard=False, **arguments):
    bare = engine_for(config, **arguments)
    dtype = "bfloat16" if "bf16" in config else "float16" if "fp16" in config else "float32"
    plan = plan_for(bare.module, timing_config(bare), **shape(), dtype=dtype, **plan_arguments)
    return engine_for(with_plan(config, plan, timeout_s=60, guard=GuardSettings(enabled=guard)), **arguments)


FP16 = {"enabled": True, "loss_scale_window": 4, "hysteresis": 1}
EQUAL = {
    "fp32": (ds_config(), {}, {}),
    "fused": (ds_config(), {"fuse": 4}, {}),
    "accumulation": (ds_config(gradient_accumulation_steps=3), {"fuse": 2}, {}),
    "clipping": (ds_config(gradient_clipping=0.1), {}, {}),
    "bf16": (ds_config(bf16={"enabled": True}), {"fuse": 3}, {}),
    "bf16, fp32 on the wire": (ds_config(bf16={"enabled": True}, communication_data_type="fp32"), {}, {}),
    "fp32, bf16 on the wire": (ds_config(communication_data_type="bf16"), {"fuse": 2}, {}),
    "fp16, steps skipped": (ds_config(fp16=FP16), {"fuse": 3}, {}),
    "fp16, identity codec": (ds_config(fp16=FP16), {"option": DIVIDED, "compressors": (FED,), "fuse": 2}, {}),
    "prescale": (ds_config(prescale_gradients=True), {}, {}),
    "predivide": (ds_config(gradient_predivide_factor=4.0), {}, {}),
    "sum": (ds_config(gradient_allreduce_op="sum"), {}, {}),
    "SGD": (ds_config(), {}, {"optimizer": torch.optim.SGD}),
    "reduce-scatter": (ds_config(), {"option": "RS.flat AG.flat", "fuse": 5}, {}),
    "reduce": (ds_config(), {"option": "RD.flat BC.flat"}, {}),
    "identity codec": (ds_config(), {"option": DIVIDED, "fuse": 2}, {}),
    "identity by turns with and without feedback": (ds_config(), {"option": DIVIDED, "compressors": (FED, BARE)}, {}),
    "hierarchical": (ds_config(), {"option": "RS.intra AR.inter AG.intra", "fuse": 2}, {}),
    "hierarchical, bf16": (ds_config(bf16={"enabled": True}), {"option": "RD.intra RS.inter AG.inter BC.intra"}, {}),
    "hierarchical, identity codec": (ds_config(), {"option": NESTED, "compressors": (FED,), "fuse": 3}, {}),
}


def equality():
    results = {}
    for name, (config, plan_arguments, arguments) in EQUAL.items():
        results[name] = {"stock": stock(config, **arguments), "planned": planned(config, plan_arguments, **arguments)}
    return results


def compressed():
    """Every codec trains, and all ranks keep equal weights."""
    results = {}
    for name in ("topk", "randomk", "efsignsgd", "quantize", "fp16", "natural", "dgc"):
        for option in ("C.cpu AG.flat D.cpu", "C.cpu GA.flat D.cpu C.cpu BC.flat D.cpu", NESTED, ROOTED):
            settings = CompressorSettings(name=name, density=0.1 if name in ("topk", "randomk", "dgc") else None)
            losses, checksum = planned(ds_config(), {"option": option, "compressors": (settings,), "fuse": 2})
            results[f"{name} {option}"] = {"losses": losses, "checksum": checksum}
    return results


LOW_RANK = {
    "option": "P.cpu AR.flat Q.cpu AR.flat D.cpu",
    "compressors": (CompressorSettings(name="powersgd", rank=2),),
    "fuse": 3,
}


def low_rank():
    """PowerSGD under DeepSpeed: what it trains to, and which memory it leaves."""
    engine = planned_engine(ds_config(), LOW_RANK)
    try:
        losses, checksum = train(engine)
        (memory,) = engine.espresso.feedback
        return {"losses": losses, "checksum": checksum, "bytes": memory.nbytes}
    finally:
        engine.espresso.detach()


def overflow():
    """fp16 with gradients that overflow now and then: the memory of feedback around each step."""
    settings = (TOPK, CompressorSettings(name="efsignsgd", feedback="ef21"), CompressorSettings(name="dgc", density=0.1))
    told = []
    for compressor in settings:
        engine = planned_engine(
            ds_config(fp16=FP16),
            {"option": "C.cpu A2A.flat D.cpu C.cpu AG.flat D.cpu", "compressors": (compressor,), "fuse": 4},
        )
        (memory,) = engine.espresso.feedback
        steps = []
        try:
            for step in range(STEPS):
                before = snapshot(memory)
                train(engine, steps=1, first=step)
                after = snapshot(memory)
                changed = [site for site, x in before.items() if not torch.equal(after[site], x)]
                steps.append(
                    {
                        "applied": engine.was_step_applied(),
                        "changed": bool(changed),
                        "finite": all(x.isfinite().all().item() for x in after.values()),
                    }
                )
        finally:
            engine.espresso.detach()
        told.append(steps)
    return told


def snapshot(memory):
    sites = memory.state_dict()["sites"]
    return {f"{site}/{name}": x.clone() for site, named in sites.items() for name, x in named.items()}


def two_codecs():
    """Units by turns in bf16 and TopK: what trains, which residuals each leaves, and what is said of it."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        engine = planned_engine(ds_config(), {"option": "C.cpu AG.flat D.cpu", "compressors": (TOPK, BARE_BF16), "fuse": 3})
    try:
        losses, checksum = train(engine)
        sites = {memory.mode: sorted(memory.state_dict()["sites"]) for memory in engine.espresso.feedback}
    finally:
        engine.espresso.detach()
    return {"losses": losses, "checksum": checksum, "sites": sites, "said": said.getvalue()}


GUARDED = {
    "slow codec": (ds_config(gradient_accumulation_steps=2), (TopK, "encode", 0.02), (TOPK,)),
    "slow codec, fp16": (ds_config(fp16=FP16), (TopK, "encode", 0.02), (TOPK,)),
    "slow wire": (ds_config(), (Plain, "run", 0.06), (TOPK,)),
    "momentum": (ds_config(), (Plain, "run", 0.06), (CompressorSettings(name="dgc", density=0.1, feedback="dgc"),)),
}


def slowed(work, seconds):
    """A test double that takes so much more."""

    def slow(*args, **kwargs):
        time.sleep(seconds)
        return work(*args, **kwargs)

    return slow


def guarded():
    """The guard where one of both ways is made slow: what it says, what it leaves, and which steps the run trace has."""
    results = {}
    for name, (config, (owner, method, seconds), compressors) in GUARDED.items():
        original = getattr(owner, method)
        setattr(owner, method, slowed(original, seconds))
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                engine = planned_engine(config, {"option": DIVIDED, "compressors": compressors, "fuse": 6}, guard=True)
                losses, checksum = train(engine)
            with tempfile.TemporaryDirectory() as folder:
                engine.espresso.save_trace(f"{folder}/run.json")
                run = RunTrace.load(f"{folder}/run.json")
        finally:
            setattr(owner, method, original)
            engine.espresso.detach()
        outcome, (memory,) = engine.espresso.guard, engine.espresso.feedback
        results[name] = {
            "losses": losses,
            "checksum": checksum,
            "said": said.getvalue(),
            "dropped": None if outcome is None else sorted(outcome.dropped),
            "step": None if outcome is None else outcome.step,
            "bytes": memory.nbytes,
            "buffers": engine.espresso.buffer_nbytes - engine.espresso.recorder.nbytes,
            "steps": [step.step for step in run.steps],
            "backward": all(
                step.whole(Mark.BACKWARD).start_s < step.whole(Mark.BACKWARD).end_s == step.whole(Mark.FLUSH).start_s
                for step in run.steps
            ),
        }
    return results


def guard_switches():
    """By the environment, over what the block says; and what is no switch, or stands on one rank only."""
    told = {}
    for value, block in (("0", True), ("1", False), ("", True), ("off", True)):
        os.environ["ESPRESSO_GUARD"] = value
        told[f"{value} {block}"] = _guard_of({"option": DIVIDED, "compressors": (TOPK,)}, block)
    os.environ["ESPRESSO_GUARD"] = str(dist.get_rank())
    told["ranks differ"] = _guard_of({"option": DIVIDED, "compressors": (TOPK,)}, True)
    del os.environ["ESPRESSO_GUARD"]
    told["nothing compressed"] = _guard_of({}, True)
    return told


def _guard_of(plan_arguments, block):
    try:
        engine = planned_engine(ds_config(), plan_arguments, guard=block)
    except EspressoError as error:
        return str(error)
    engine.espresso.detach()
    return engine.espresso.guarding is not None


def without_block():
    """No block, one that is switched off, and a launcher's plan whose block is: the engine is DeepSpeed's own."""
    plain = engine_for(ds_config())
    off = engine_for({**ds_config(), "espresso": {"enabled": False}})
    plan = plan_for(plain.module, timing_config(plain), **shape())
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patched:
        path = Path(folder) / "plan.json"
        path.write_text(json.dumps(with_plan(ds_config(), plan, enabled=False)))
        patched.setenv("ESPRESSO_CONFIG", str(path))
        launched = engine_for(ds_config())
    engines = (plain, off, launched)
    return ["buffered_allreduce_fallback" in vars(engine) or hasattr(engine, "espresso") for engine in engines]


def failures():
    """Messages of what must stop every rank at start."""
    bare = engine_for(ds_config())
    rank, world = dist.get_rank(), dist.get_world_size()
    facts, model = timing_config(bare), bare.module

    def plan(**arguments):
        return plan_for(model, facts, **{**shape(), **arguments})

    def edited(change, seal=True):
        changed = plan().model_copy(update=change)
        return with_plan(ds_config(), changed.sealed() if seal else changed)

    good = plan()
    tensors = good.tensors
    here = cluster_kind(bare)
    larger = here.model_copy(update={"hosts": tuple(h.model_copy(update={"cores": h.cores + 62}) for h in here.hosts)})
    kept = {kind: good.made_for.model_copy(update={"cluster": kind}) for kind in (here, larger)}
    ghost = tensors[0].model_copy(update={"name": "ghost", "unit": tensors[-1].unit + 1})
    attempts = {
        "no plan": {**ds_config(), "espresso": {"compressor": {"name": "topk"}}},
        "unknown key": {**ds_config(), "espresso": {"compresor": {"name": "topk"}}},
        "world size": with_plan(ds_config(), plan(nodes=1, ranks=world + 1)),
        "config": with_plan(ds_config(train_micro_batch_size_per_gpu=8), good),
        "pipeline": with_plan(ds_config(), good, pipeline={}),
        "unmanaged": with_plan(ds_config(managed_gradient_accumulation=False), good),
        "zero": with_plan(ds_config(zero_optimization={"stage": 1}), good),
        "missing tensor": edited({"tensors": tensors[1:]}),
        "extra tensor": edited({"tensors": (*tensors, ghost)}),
        "shape": edited({"tensors": (tensors[0].model_copy(update={"shape": (9,)}), *tensors[1:])}),
        "edited": edited({"tensors": tensors[::-1]}, seal=False),
        "sums payloads": with_plan(ds_config(), plan(option="C.cpu AR.flat D.cpu", compressors=(BARE_BF16, TOPK))),
        "votes": with_plan(ds_config(), plan(option="RS.intra C.cpu AG.inter D.cpu AG.intra", compressors=(MAJORITY,))),
        "codec out of range": edited({"tensors": (*tensors[:-1], tensors[-1].model_copy(update={"codec": 1}))}),
        "gpu": with_plan(ds_config(), plan(option="C.gpu AG.flat D.gpu")),
        "unknown codec": with_plan(ds_config(), plan(compressors=(IDENTITY, CompressorSettings(name="topq")))),
        "ranks differ": with_plan(ds_config(), plan(compressors=(CompressorSettings(name="identity", seed=rank),))),
        "one rank torn": with_plan(ds_config(), good) if rank else edited({"made_by": "someone"}, seal=False),
        "newer schema": with_plan(ds_config(), good),
        "same cluster": edited({"made_for": kept[here]}),
        "another cluster": edited({"made_for": kept[larger]}),
        "any cluster": edited({"made_for": kept[larger]}),
    }
    attempts["any cluster"]["espresso"]["any_cluster"] = True
    attempts["newer schema"]["espresso"]["plan"]["schema_version"] = 99
    messages = {}
    for name, config in attempts.items():
        try:
            engine = engine_for(config)
            messages[name] = "no error"
            engine.espresso.detach()
        except EspressoError as error:
            messages[name] = f"{type(error).__name__}: {error}"
    return messages


def alone():
    """Rank 0 has a plan, the others have none: it must not wait for them for ever."""
    bare = engine_for(ds_config())
    plan = plan_for(bare.module, timing_config(bare), **shape())
    try:
        engine_for(with_plan(ds_config(), plan, timeout_s=2) if dist.get_rank() == 0 else ds_config())
        return "no error"
    except EspressoError as error:
        return str(error)


def refire():
    """A hook that fires twice where the plan says once, as reentrant checkpointing would make it."""
    engine = planned_engine(ds_config(), {})
    synchroniser = engine.espresso.synchroniser
    try:
        synchroniser.ready("last.bias")
        synchroniser.ready("last.bias")
        return "no error"
    except EspressoError as error:
        return str(error)
    finally:
        synchroniser.flush()
        engine.espresso.detach()


def other_parameters():
    """Messages where, after the start, what was frozen is trained or the other way round."""
    messages = []
    for trains in (True, False):
        engine = planned_engine(ds_config(), {})
        param = next(p for p in engine.module.parameters() if p.requires_grad != trains)
        try:
            param.requires_grad_(trains)
            train(engine, steps=1)
            messages.append("no error")
        except EspressoError as error:
            messages.append(str(error))
        finally:
            engine.espresso.detach()
    return messages


CASES = (
    equality,
    compressed,
    low_rank,
    overflow,
    two_codecs,
    guarded,
    guard_switches,
    without_block,
    failures,
    other_parameters,
    refire,
    alone,
)


def main():
    torch.set_num_threads(1)
    allow_fp16()
    deepspeed.init_distributed()
    engine_facts.socket = SimpleNamespace(gethostname=lambda: f"host{dist.get_rank() // 2}")
    mine = {case.__name__: case() for case in CASES}
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if dist.get_rank() == 0:
        with open(sys.argv[1], "w") as file:
            json.dump(everyone, file)
    dist.destroy_process_group()
    os._exit(0)  # see scripts/tiny.py


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        traceback.print_exc()
        raise

"""One rank of the pipeline tests: every case in one process, a fresh engine each. Every rank writes what it saw.

torchrun --nproc-per-node RANKS pipeline_worker.py STAGES FOLDER
"""

import json
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from any_cpu import allow_fp16
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

from espresso_ds.core.errors import EspressoError
from espresso_ds.integrations.pipeline_checkpoint import RULE
from espresso_ds.runtime.parcel import Sender

WIDTH, BATCH, STEPS = 24, 4, 3
TOPK = {"name": "topk", "density": 0.3}
BITS = {"name": "quantize", "bits": 8}
COARSE = {"name": "quantize", "bits": 2}
AQSGD = {**COARSE, "feedback": "aqsgd"}
POSITIONS = {"examples": "position", "example_memory": "8 bits"}
IDENTITY = {"name": "identity"}
ZERO1 = {"zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}


class Plain(torch.nn.Module):
    """A tensor in, a tensor out."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return torch.tanh(self.linear(x))


class WithIds(Plain):
    """Integers in front of the activations: DeepSpeed's pool of receive buffers would give gradients an integer one."""

    def forward(self, both):
        if isinstance(both, torch.Tensor):
            both = torch.arange(both.numel()).view(both.shape), both
        ids, x = both
        return ids, super().forward(x) + ids.sin() / 9


class Masked(Plain):
    """A mask behind the activations, which DeepSpeed casts to half and sends along."""

    def forward(self, both):
        x, mask = both
        return super().forward(x) * (1 + mask), mask


class Two(Plain):
    """Two tensors of activations of unequal sizes."""

    def forward(self, both):
        x, y = both if isinstance(both, tuple) else (both, both[:, :5])
        return super().forward(x), y * 1.5 + self.linear.bias[:5]


def loss(outputs, labels):
    tensors = [t for t in (outputs if isinstance(outputs, tuple) else (outputs,)) if t.is_floating_point()]
    return sum((t - labels[:, : t.shape[1]].to(t.dtype)).pow(2).mean() for t in tensors)


def batches(micro_batches, seed, dtype, uneven=False, masked=False):
    """Other ones on other replicas."""
    generator = torch.Generator().manual_seed(seed)
    for number in range(micro_batches):
        rows = BATCH + (3 * number % 4 if uneven else 0)
        x, y = (torch.randn(rows, WIDTH, generator=generator).to(dtype) for _ in range(2))
        yield ((x, x > 0) if masked else x), y


def examples(micro_batches, replicas):
    """As many as one step needs, for DeepSpeed's own loader."""
    x, y = (torch.cat(each) for each in zip(*batches(micro_batches * replicas, 0, torch.float32), strict=True))
    return list(zip(x, y, strict=True))


def trained(stages, layer=Plain, micro_batches=4, block=None, steps=STEPS, checkpointed=0, again=False, **given):
    """Losses of training and of evaluation.

    Args:
        again: on the same batch in every step.
        given: `dataset`: whether the engine reads the data itself; `load`, `save`: folders of a checkpoint of before the first
            and of after the second step; `partitioned`: two ranks of a stage hold halves of what crosses; `uneven`: micro-batches
            of other sizes; all else is DeepSpeed's.
    """
    config = {key: value for key, value in given.items() if key not in ("dataset", "load", "save", "partitioned", "uneven")}
    torch.manual_seed(0)
    layers, dtype = [LayerSpec(layer) for _ in range(2 * stages)], torch.bfloat16 if "bf16" in config else torch.float32
    shape = {"num_stages": stages}
    if given.get("partitioned"):
        shape = {"topology": PipeModelDataParallelTopology(num_pp=stages, num_mp=2, num_dp=1)}
        config["pipeline"] = {"pipe_partitioned": True, "grad_partitioned": True}
    if given.get("uneven"):
        shape["dynamic_shape"] = True
    module = PipelineModule(layers, **shape, loss_fn=loss, activation_checkpoint_interval=checkpointed)
    settings = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": micro_batches,
        "steps_per_print": 10**9,
        "optimizer": {"type": "SGD", "params": {"lr": 0.2}},
        **({} if block is None else {"espresso": {"pipeline": block, "timeout_s": 60}}),
        **config,
    }
    dataset = examples(micro_batches, dist.get_world_size() // stages) if given.get("dataset") else None
    engine, *_ = deepspeed.initialize(model=module, config=settings, training_data=dataset)
    engine.set_has_attention_mask(layer is Masked)
    if "load" in given:
        engine.load_checkpoint(given["load"])
    replica = engine.grid.get_data_parallel_id()
    losses, how = [], {"uneven": given.get("uneven"), "masked": layer is Masked}
    for _ in range(steps):
        step = engine.global_steps
        data = None if dataset else batches(micro_batches, replica if again else 10 * step + replica, dtype, **how)
        losses.append(engine.train_batch(data).item())
        if step == 1 and "save" in given:
            engine.save_checkpoint(given["save"])
        if step == 1:
            losses.append(engine.eval_batch(batches(micro_batches, 999 + replica, dtype, **how)).item())
    losses.append(engine.eval_batch(batches(micro_batches, 999 + replica, dtype, **how)).item())
    if block is not None:
        vars(engine).pop("espresso").detach()
    engine.destroy()
    return losses


@contextmanager
def slow_senders():
    """Every message takes a while before it leaves."""
    write = Sender.write

    def slowly(*args):
        time.sleep(0.02)
        write(*args)

    Sender.write = slowly
    try:
        yield
    finally:
        Sender.write = write


def resumed(stages, folder, block):
    """Losses of training without a break, and of going on from a checkpoint: with its memory, and without."""
    with slow_senders():  # the last gradients of a step wait in their channel when it is saved
        whole = trained(stages, block=block, again=True, steps=5, save=folder)
    after = trained(stages, block=block, again=True, steps=3, load=folder)
    for path in folder.glob("*/espresso_pipeline_rank*.pt") if dist.get_rank() == 0 else ():
        path.rename(path.with_suffix(".gone"))
    dist.barrier()
    forgotten = trained(stages, block=block, again=True, steps=3, load=folder)
    dist.barrier()
    for path in folder.glob("*/*.gone") if dist.get_rank() == 0 else ():
        path.rename(path.with_suffix(".pt"))
    dist.barrier()
    return {"whole": whole, "after": after, "forgotten": forgotten}


def swap(folder):
    """Give ranks 0 and 1 each other's memory."""
    one, other = (next(folder.glob(f"*/espresso_pipeline_rank{rank}.pt")) for rank in range(2))
    dist.barrier()
    if dist.get_rank() == 0:
        away = one.rename(one.with_suffix(".away"))
        other.rename(one)
        away.rename(other)
    dist.barrier()


def failure(stages, **case):
    """The message with which a case stops, at start if not told otherwise."""
    try:
        trained(stages, **{"steps": 0, **case})
    except EspressoError as error:
        return str(error)
    return "no error"


def failure_with_plan(stages, **case):
    """The same where the launcher brought a plan for gradients, which must not be passed over in silence."""
    os.environ["ESPRESSO_CONFIG"] = "plan.json"
    try:
        return failure(stages, **case)
    finally:
        del os.environ["ESPRESSO_CONFIG"]


def main():
    stages, folder = int(sys.argv[1]), Path(sys.argv[2])
    allow_fp16()
    deepspeed.init_distributed(dist_backend="gloo")
    told = {"stages": stages, "equal": {}, "compressed": {}, "failures": {}}
    for micro_batches in (1, 2, 3, 8):
        case = dict(stages=stages, micro_batches=micro_batches)
        stock = trained(**case)
        for name, block in (("as it is", {}), ("identity", {"forward": IDENTITY, "backward": IDENTITY})):
            told["equal"][f"{micro_batches} micro-batches, {name}"] = stock, trained(block=block, **case)
    told["equal"]["bf16"] = [trained(stages, bf16={"enabled": True}, block=block) for block in (None, {})]
    told["equal"]["ZeRO 1"] = [trained(stages, **ZERO1, block=block) for block in (None, {"forward": IDENTITY})]
    told["equal"]["checkpointed"] = [trained(stages, block=block, checkpointed=1) for block in (None, {"forward": IDENTITY})]
    told["equal"]["two tensors"] = [trained(stages, Two, block=block) for block in (None, {})]
    told["equal"]["uneven micro-batches"] = [trained(stages, uneven=True, block=block) for block in (None, {"forward": IDENTITY})]
    told["equal"]["mask behind"] = [trained(stages, Masked, block=block) for block in (None, {"forward": IDENTITY})]
    told["equal"]["ids in front"] = [trained(stages, WithIds, block=block) for block in ({}, {"forward": IDENTITY})]
    both = {"forward": BITS, "backward": BITS}
    if dist.get_world_size() == 2 * stages:
        blocks = (None, {}, {"forward": IDENTITY, "backward": IDENTITY})
        stock, *ours = [trained(stages, partitioned=True, block=block) for block in blocks]
        told["equal"] |= {f"partitioned {number}": [stock, each] for number, each in enumerate(ours)}
        told["partitioned"] = {"none": stock, "8 bits": trained(stages, partitioned=True, block=both)}
    told["compressed"] = {
        "none": trained(stages),
        "8 bits": trained(stages, block=both),
        "8 bits, bf16": trained(stages, block=both, bf16={"enabled": True}),
        "8 bits each example": trained(stages, block={**both, "per_example": True}),
        "topk": trained(stages, block={"forward": TOPK}),
        "topk, uncompressed evaluation": trained(stages, block={"forward": TOPK, "evaluation": "uncompressed"}),
        "topk, ef21": trained(stages, block={"forward": {**TOPK, "feedback": "ef21"}}),
        "topk on boundary 0 only": trained(stages, block={"boundaries": {"0": {"forward": TOPK}}}),
        "shared indices": trained(stages, block={"forward": TOPK, "shared_indices": True}),
        "aqsgd": trained(stages, block={"forward": {**BITS, "feedback": "aqsgd"}, "backward": BITS}),
        "uneven, 8 bits": trained(stages, uneven=True, block=both),
        "two tensors, ef": trained(stages, Two, block={"forward": {**BITS, "feedback": "ef"}, "backward": BITS}),
    }
    told["learnt"] = {
        "none": trained(stages, steps=12, again=True),
        "none, positions": trained(stages, steps=12, dataset=True),
        "2 bits": trained(stages, steps=12, again=True, block={"forward": COARSE}),
        "aqsgd": trained(stages, steps=12, again=True, block={"forward": AQSGD}),
        "aqsgd, positions": trained(stages, steps=12, dataset=True, block={**POSITIONS, "forward": AQSGD}),
        "shared indices": trained(stages, steps=12, again=True, block={"forward": TOPK, "shared_indices": True}),
        "both ways": trained(stages, steps=12, again=True, block={"forward": {**TOPK, "feedback": "ef21"}, "backward": BITS}),
    }
    remembering = {"forward": AQSGD, "backward": {**TOPK, "feedback": "ef21"}}
    told["resumed"] = resumed(stages, folder / "checkpoint", remembering)
    (folder / "rule is a folder/global_step2" / RULE).mkdir(parents=True, exist_ok=True)
    told["failures"] = {
        "rule is a folder": failure(stages, steps=2, save=folder / "rule is a folder", block=remembering),
        "other memory": failure(stages, load=folder / "checkpoint", block={**remembering, "example_memory": "8 bits"}),
        "positions of an unknown epoch": failure(stages, block={**POSITIONS, "forward": AQSGD}),
        "shared indices of bits": failure(stages, block={"forward": BITS, "shared_indices": True}),
        "aqsgd backward": failure(stages, block={"backward": AQSGD}),
        "no such boundary": failure(stages, block={"boundaries": {str(stages - 1): {}}}),
        "unknown codec": failure(stages, block={"forward": {"name": "topc"}}),
        "dgc": failure(stages, block={"forward": {"name": "dgc", "density": 0.1, "feedback": "dgc"}}),
        "powersgd": failure(stages, block={"backward": {"name": "powersgd", "rank": 1}}),
        "fp16": failure(stages, block=both, fp16={"enabled": True}),
        "plan of the launcher": failure_with_plan(stages, block=both),
        "ranks differ": failure(stages, block={"forward": {**BITS, "bits": 8 - (dist.get_rank() > 0)}}),
    }
    swap(folder / "checkpoint")
    told["failures"]["another rank's memory"] = failure(stages, load=folder / "checkpoint", block=remembering)
    swap(folder / "checkpoint")
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(told))
    dist.barrier()
    os._exit(0)  # gloo's threads may abort the interpreter's end


if __name__ == "__main__":
    main()

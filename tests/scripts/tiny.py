"""An ordinary DeepSpeed script; `--forget PLAN` removes a plan file first, as if this host had never seen it.

With `--tell FILE` each rank says where it runs, which plan it follows, whether FILE is there and what ESPRESSO_NOTE brought.
"""

import argparse
import json
import os
import socket

import deepspeed
import torch
import torch.distributed as dist

parser = argparse.ArgumentParser()
parser.add_argument("--forget")
parser.add_argument("--tell")
parser.add_argument("--steps", type=int, default=4)
parser.add_argument("--local_rank", type=int, default=-1)
args = deepspeed.add_config_arguments(parser).parse_args()

torch.set_num_threads(1)
deepspeed.init_distributed(distributed_port=29652)
if args.forget and dist.get_rank() == 0:
    os.unlink(args.forget)
dist.barrier()
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
engine, *_ = deepspeed.initialize(args=args, model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
for _ in range(args.steps):
    x = torch.randn(4, 16)
    loss = engine(x).square().mean()
    engine.backward(loss)
    engine.step()
weights = [None] * dist.get_world_size()
dist.all_gather_object(weights, sum(p.double().sum().item() for p in engine.module.parameters()))
assert len(set(weights)) == 1, weights
if args.tell:
    told = {
        "rank": dist.get_rank(),
        "host": socket.gethostname(),
        "seal": engine.espresso.plan.seal,
        "file": os.path.exists(args.tell),
        "note": os.environ.get("ESPRESSO_NOTE"),
        "weights": weights[dist.get_rank()],
    }
    print(f"told {json.dumps(told)}\n", end="", flush=True)
if dist.get_rank() == 0:
    print(f"trained {dist.get_world_size()} ranks; plan: {hasattr(engine, 'espresso')}\n", end="", flush=True)
dist.destroy_process_group()
# DeepSpeed keeps process groups for ever, and now and then gloo's threads abort the interpreter's exit, plan or no plan.
# Under MPI the exit has to be the ordinary one.
if "OMPI_COMM_WORLD_RANK" not in os.environ:
    os._exit(0)

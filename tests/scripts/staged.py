"""A user's PipelineModule, trained for a few steps; nothing in it knows of us. staged.py STEPS"""

import sys

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule

WIDTH, BATCH, STAGES = 48, 6, 2


class Layer(torch.nn.Sequential):
    def __init__(self):
        super().__init__(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Tanh())


def batches(dtype):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, WIDTH, generator=generator).to(dtype)
    while True:
        yield x, x.flip(0)


if __name__ == "__main__":
    deepspeed.init_distributed(dist_backend="gloo")
    torch.manual_seed(0)
    module = PipelineModule([LayerSpec(Layer) for _ in range(4)], num_stages=STAGES, loss_fn=torch.nn.functional.mse_loss)
    engine, *_ = deepspeed.initialize(model=module, config="ds.json")
    data = batches(next(engine.module.parameters()).dtype)
    losses = [engine.train_batch(data).item() for _ in range(int(sys.argv[1]))]
    if torch.distributed.get_rank() == 0:
        print(f"losses {losses}", flush=True)
    torch.distributed.destroy_process_group()  # a rank that just leaves may abort its neighbours' gloo threads

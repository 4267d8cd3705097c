"""One rank of a small DDP model with torch's PowerSGD hook, then the same gradients by ours, from the same first factors.

Arguments: this rank, the number of ranks, a file to meet at, a file for the results: for each rank of the approximation this
rank's inputs, the hook's outputs and ours, each of shape (steps, elements of the bucket), and the sizes of the matrices.
"""

import sys
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

from espresso_ds.compressors.powersgd import PowerSGD
from espresso_ds.core.option import Level, Option
from espresso_ds.feedback.low_rank import LowRankMemory
from espresso_ds.runtime.low_rank import LowRank
from espresso_ds.runtime.streams import Offload

STEPS, PLAIN_STEPS = 8, 2
SEED = 11
DEADLINE_S = 60


def train(rank, approximation):
    """Shapes of the bucket's tensors, and what the hook was given and made of it, step by step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 24, 3), nn.Tanh(), nn.Flatten(), nn.Linear(24 * 16, 40), nn.Tanh(), nn.Linear(40, 33))
    ddp = nn.parallel.DistributedDataParallel(model)
    shapes, inputs, outputs = [], [], []

    def hook(state, bucket):
        shapes.append(tuple(tuple(gradient.shape) for gradient in bucket.gradients()))
        inputs.append(bucket.buffer().clone())

        def keep(future):
            outputs.append(future.value().clone())
            return future.value()

        return powerSGD_hook(state, bucket).then(keep)

    ddp.register_comm_hook(PowerSGDState(None, approximation, PLAIN_STEPS, random_seed=SEED), hook)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(STEPS):
        optimizer.zero_grad()
        x, y = (torch.randn(shape, generator=generator) for shape in ((6, 3, 6, 6), (6, 33)))
        nn.functional.mse_loss(ddp(x), y).backward()
        optimizer.step()
    assert len(inputs) == STEPS and len(set(shapes[PLAIN_STEPS:])) == 1, "one bucket, the same in all steps"
    return shapes[-1], torch.stack(inputs[PLAIN_STEPS:]), torch.stack(outputs[PLAIN_STEPS:])


def ours(world, approximation, shapes, inputs):
    """The mean over ranks, step by step, from the factors that the hook draws first."""
    option = Option.parse("P.cpu AR.flat Q.cpu AR.flat D.cpu")
    layout, device = PowerSGD(approximation).layout(shapes), torch.device("cpu")
    basis = torch.empty(layout.right_numel)
    torch.manual_seed(np.random.RandomState(SEED).randint(1_000_000_000))
    for matrix in layout.matrices:
        matrix.right(basis).copy_(torch.linalg.qr(torch.randn(matrix.cols, matrix.rank))[0].t())
    memory = LowRankMemory()
    sites = {"t": {"basis": basis, "residual": torch.zeros(layout.numel)}}
    memory.load_state_dict({"mode": "ef", "dtype": "float32", "scale": 1.0, "sites": sites})
    groups = {(lane, Level.FLAT): dist.new_group() for lane in range(2)}
    low_rank = LowRank("t", option, layout, device, memory, 0, groups, Offload(device))
    outputs = []
    for given in inputs:
        x = given.clone()
        for pending in low_rank.run(x):
            pending.wait(DEADLINE_S)
        outputs.append(x / world)
    return torch.stack(outputs), [(matrix.rows, matrix.cols) for matrix in layout.matrices]


def main(rank, world, meeting, results):
    """Run all."""
    store = dist.FileStore(meeting, world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=DEADLINE_S))
    found = {}
    for approximation in (1, 2, 4):
        shapes, inputs, theirs = train(rank, approximation)
        outputs, matrices = ours(world, approximation, shapes, inputs)
        found[approximation] = {"inputs": inputs, "theirs": theirs, "ours": outputs, "matrices": matrices}
    torch.save(found, results)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])

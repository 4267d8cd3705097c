"""An ordinary accelerate script; the DeepSpeed config comes from `accelerate launch`."""

import os

import torch
from accelerate import Accelerator

torch.set_num_threads(1)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
accelerator = Accelerator()
optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(32, 16)), batch_size=4)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for (x,) in loader:
    loss = model(x).square().mean()
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
if accelerator.is_main_process:
    print(f"trained; plan: {hasattr(model, 'espresso')}\n", end="", flush=True)
accelerator.end_training()
os._exit(0)  # see tiny.py

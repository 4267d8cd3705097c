"""An ordinary HF Trainer script: trainer.py DEEPSPEED_CONFIG."""

import os
import sys

import torch
from accelerate.state import PartialState
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

# On CPU ranks accelerate leaves the backend unset under DeepSpeed and then takes two ranks for one; GPUs don't need this.
PartialState._prepare_backend = lambda self, *_, **__: ("gloo", __import__("accelerate").DistributedType.MULTI_CPU)
logging.set_verbosity_error()


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, i):
        return {"input_ids": torch.full((8,), i % 50), "labels": torch.tensor(i % 2)}


class Watch(TrainerCallback):
    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            print(f"trained {args.world_size} ranks; steps: {state.global_step}\n", end="", flush=True)


torch.set_num_threads(1)
torch.manual_seed(0)
config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
arguments = TrainingArguments(
    output_dir=sys.argv[2],
    deepspeed=sys.argv[1],
    per_device_train_batch_size=4,
    max_steps=4,
    report_to=[],
    save_strategy="no",
    disable_tqdm=True,
)
Trainer(model=BertForSequenceClassification(config), args=arguments, train_dataset=Data(), callbacks=[Watch()]).train()
os._exit(0)  # see tiny.py

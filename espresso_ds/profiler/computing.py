"""Something to compute while codecs or links are busy: matrix products, counted and timed."""

from __future__ import annotations

import time

import torch

_MATMUL = 384


def calibrate(device: torch.device, seconds: float) -> int:
    """How many products take about `seconds`."""
    multiply(2, device)
    trial = 10
    return max(trial, round(trial * seconds / multiply(trial, device)))


def multiply(products: int, device: torch.device) -> float:
    """Seconds of so many products of square matrices."""
    left = torch.full((_MATMUL, _MATMUL), 1e-3, device=device)
    out = torch.empty_like(left)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(products):
        torch.mm(left, left, out=out)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return time.perf_counter() - start

"""Steady state of the runtime: 2 x 2 ranks as processes of this machine, every kind of option with every kind of codec.

    python -m benchmarks.runtime [--steps 200] [--out benchmarks/results/runtime.json]

No model computes: a step is gradients given, synchronised and taken back. Memory is looked at after every step: the resident set,
and what the C library has handed out. Operators whose result gets memory of its own are counted in every thread of the runtime
(results up to 64 bytes, such as a norm, are not; what gloo does inside is seen in the memory only).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console

from espresso_ds.core.record import write_json
from espresso_ds.runtime.trace import Recorder

from ..machine import machine

RESULTS = Path(__file__).resolve().parents[1] / "results/runtime.json"
RANKS, PORT, WARMUP = 4, 29671, 20


def steady_state(steps: int) -> dict:
    """What rank 0 saw."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "rank0.json"
        command = [sys.executable, "-m", "benchmarks.runtime.rank", str(out), str(WARMUP), str(steps)]
        fixed = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(PORT), "OMP_NUM_THREADS": "1"}
        ranks = [subprocess.Popen(command, env={**os.environ, **fixed, "RANK": str(rank)}) for rank in range(RANKS)]
        try:
            failed = [rank for rank, process in enumerate(ranks) if process.wait(timeout=60 + 10 * steps)]
        finally:
            for process in ranks:
                process.kill()
        if failed:
            raise SystemExit(f"ranks {failed} failed")
        seen = json.loads(out.read_text())
    rss, in_use, seconds = seen.pop("rss"), seen.pop("in_use"), seen.pop("seconds")
    return {
        **seen,
        "median_step_s": statistics.median(seconds),
        "rss_growth_bytes": rss[-1] - rss[0],
        "rss_growth_second_half_bytes": rss[-1] - rss[len(rss) // 2],
        "in_use_growth_bytes": in_use[-1] - in_use[0],
        "in_use_growth_second_half_bytes": in_use[-1] - in_use[len(in_use) // 2],
        "allocations_per_step": sum(seen["allocations"].values()) / steps,
    }


def span_seconds(count: int = 100_000) -> float:
    """Seconds to record one span, the median of nine times `count`."""
    recorder = Recorder(1, 100)
    writer = recorder.lane(0)

    def once() -> float:
        start = time.perf_counter()
        for number in range(count):
            writer.span(number // 100, number % 100, 3, number, number + 1)
        return (time.perf_counter() - start) / count

    return statistics.median(once() for _ in range(9))


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.runtime", description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    about = machine() | {"torch": torch.__version__}
    found = {"machine": about, "steady_state": steady_state(arguments.steps), "span_s": span_seconds()}
    write_json(arguments.out, found)
    Console().print_json(data=found)


if __name__ == "__main__":
    main()

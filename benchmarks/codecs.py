"""Speed of every codec with error feedback, in GB/s of fp32 input, beside `r += g` in the same run.

Reproduce: OMP_NUM_THREADS=1 python benchmarks/codecs.py

One thread, in its own CPU time, which leaves out what others take of a shared machine (but not what they take of its caches
and memory bandwidth). Every repeat runs all cases once, so that a disturbance hits them alike; figures are medians over
repeats, ratios are medians of each repeat's own ratio. A case runs several times within a repeat until it has handled some 16
MB, over different tensors where they are small: 2^14 elements stay in the cache, 2^22 do not. Encoding is `Feedback.encode`,
decoding is `decode_add`. Writes results/codecs.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from espresso_ds.compressors.registry import CODECS, make
from espresso_ds.core.config import CompressorSettings
from espresso_ds.feedback import Feedback

SIZES = (1 << 14, 1 << 18, 1 << 22)
SETTINGS = [CompressorSettings(name=name) for name in CODECS] + [CompressorSettings(name="quantize", bits=8)]
LIMIT = "r += g"


def label(settings: CompressorSettings) -> str:
    """Name and parameters of a codec."""
    given = {**CODECS[settings.name].defaults, **settings.model_dump(include={"density", "bits"}, exclude_none=True)}
    return " ".join([settings.name, *(f"{key}={value}" for key, value in given.items())])


def cases(numel: int) -> dict[tuple[str, str], Callable[[int], object]]:
    """What to time on tensors of `numel` elements: (codec, direction) -> function of the tensor's number."""
    count = max(1, (1 << 20) // numel)
    generator = torch.Generator().manual_seed(numel)
    grads = [torch.randn(numel, generator=generator) * 1e-3 for _ in range(count)]
    sums = [torch.zeros(numel) for _ in range(count)]
    found: dict[tuple[str, str], Callable[[int], object]] = {(LIMIT, ""): lambda i: sums[i % count].add_(grads[i % count])}
    for settings in SETTINGS:
        codec, memory = make(settings), Feedback("ef")
        payloads = [torch.empty(codec.payload_nbytes(numel), dtype=torch.uint8) for _ in range(count)]

        def encode(i, codec=codec, memory=memory, payloads=payloads):  # noqa: ANN001
            i %= count
            memory.encode(codec, grads[i], payloads[i], i, str(i))

        def decode(i, codec=codec, payloads=payloads):  # noqa: ANN001
            i %= count
            codec.decode_add(payloads[i], sums[i], i)

        for i in range(2 * count):
            encode(i)
        found[label(settings), "encode + EF"] = encode
        found[label(settings), "decode + add"] = decode
    return found


def measure(repeats: int) -> list[dict[str, str | int | float]]:
    """One row per codec, direction and size."""
    rows = []
    for numel in SIZES:
        timed = cases(numel)
        calls = max(1, (1 << 22) // numel)
        seconds: dict[tuple[str, str], list[float]] = {case: [] for case in timed}
        for _ in track(range(repeats), f"2^{numel.bit_length() - 1} elements"):
            for case, run in timed.items():
                run(0)
                start = time.thread_time()
                for i in range(calls):
                    run(i)
                seconds[case].append((time.thread_time() - start) / calls)
        for (codec, direction), taken in seconds.items():
            ratios = [limit / own for limit, own in zip(seconds[LIMIT, ""], taken, strict=True)]
            quartiles = statistics.quantiles(taken)
            rows.append(
                {
                    "codec": codec,
                    "direction": direction,
                    "numel": numel,
                    "gb_per_s": 4 * numel / statistics.median(taken) / 1e9,
                    "ratio_to_limit": statistics.median(ratios),
                    "spread": (quartiles[2] - quartiles[0]) / quartiles[1],
                }
            )
    return rows


def show(rows: list[dict[str, str | int | float]]) -> None:
    """Print the table: codecs down, sizes across."""
    table = Table(title=f"GB/s of fp32 input, one thread (share of `{LIMIT}`)")
    for column in ("codec", "direction", *(f"2^{numel.bit_length() - 1}" for numel in SIZES)):
        table.add_column(column, justify="left" if column in ("codec", "direction") else "right")
    for codec, direction in dict.fromkeys((row["codec"], row["direction"]) for row in rows):
        cells = [row for row in rows if (row["codec"], row["direction"]) == (codec, direction)]
        table.add_row(codec, direction, *(f"{cell['gb_per_s']:.2f} ({cell['ratio_to_limit']:.2f})" for cell in cells))
    Console().print(table)


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "codecs.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(arguments.repeats)
    about = {
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "clock": "thread CPU time",
        "load_average_1min": os.getloadavg()[0],
        "repeats": arguments.repeats,
    }
    arguments.output.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    show(rows)


if __name__ == "__main__":
    main()

"""Run the planner's benchmarks, or those named, and write what they found.

    python -m benchmarks.planner [--parts paper,gaps] [--out benchmarks/results/planner.json]

Parts that are not run keep what the file has of them. The paper's models and testbeds are read from `shared/`, beside the
checkout.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from rich.console import Console

from espresso_ds.core.record import write_json

from ..machine import machine
from . import brute_force, gaps, paper, plain_algorithm_1, speed

PARTS = {"paper": paper, "brute_force": brute_force, "gaps": gaps, "plain_algorithm_1": plain_algorithm_1, "speed": speed}
RESULTS = Path(__file__).resolve().parents[1] / "results/planner.json"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planner", description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="(default: %(default)s)")
    arguments = parser.parse_args()
    chosen = arguments.parts.split(",")
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"unknown parts {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    console = Console()
    kept = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for name in chosen:
        about, began = machine(), time.perf_counter()
        result = PARTS[name].run()
        kept[name] = {"machine": about, "took_s": time.perf_counter() - began, **result}
        write_json(arguments.out, kept)
        for table in PARTS[name].tables(result):
            console.print(table)


if __name__ == "__main__":
    main()

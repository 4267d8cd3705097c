"""Sweep past this machine by simulation, check where both exist, and write figures, pictures and the tables of the page.

    python -m benchmarks.sweep                   # everything
    python -m benchmarks.sweep traces large      # the simulations: minutes, no cluster
    python -m benchmarks.sweep planning          # how long planning takes
    python -m benchmarks.sweep check             # the models against emulated clusters of this machine, measured now
    python -m benchmarks.sweep page              # pictures and tables again from the figures there are

Parts that are not run keep what the file has of them. The paper's models and testbeds are read from `shared/`, beside the
checkout.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from rich.console import Console

from espresso_ds.core.record import write_json

from ..machine import machine
from ..planner.testbeds import SHARED
from . import check, draw, large, page, paper, planning, traces

PARTS = {"traces": traces, "large": large, "planning": planning, "check": check}
ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results/sweep.json"
DOCS = ROOT / "docs"


def main() -> int:
    """Simulate and measure, print, write. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}, page (default: all)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="(default: %(default)s)")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where sweep.md and its pictures are (default: %(default)s)")
    arguments = parser.parse_args()
    chosen = arguments.parts or list(PARTS)
    if unknown := set(chosen) - {*PARTS, "page"}:
        parser.error(f"unknown parts {', '.join(sorted(unknown))}; there are {', '.join(PARTS)} and page")
    if missing := [folder for folder in ("traces", "testbeds") if not (SHARED / folder).is_dir()]:
        if set(chosen) & {"traces", "large", "planning"}:
            print(f"{SHARED} lacks {' and '.join(missing)}: the simulations need the paper's; check does not", file=sys.stderr)
            return 1
    console, kept = Console(), json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for name, part in PARTS.items():
        if name not in chosen:
            continue
        about, began = machine(), time.perf_counter()
        result = part.run()
        kept[name] = {"machine": about, "took_s": time.perf_counter() - began, **result}
        if name == "traces":
            kept["paper"] = paper.run_on(result)
        write_json(arguments.out, kept)
        for table in (*part.tables(result), *(paper.tables(kept["paper"]) if name == "traces" else ())):
            console.print(table)
    page.write(kept, {**PARTS, "paper": paper}, arguments.docs / "sweep.md")
    for picture in draw.pictures(kept, arguments.docs):
        console.print(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())

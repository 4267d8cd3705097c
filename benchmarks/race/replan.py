"""Whether `espresso replan` mends a plan whose profiles are off: made for links of one rate, it runs at others.

    python -m benchmarks.race.replan --model gpt2-30m --made-for 1gbit --run-at 100mbit,200mbit,1gbit

For each rate a traced run of the stale plan, `espresso replan` with its traces, and then interleaved: computing only, the stale
plan, the one made from its run, and one made from profiles taken at that rate. Profiles and plans are those of the race. Writes
benchmarks/results/replan/MODEL-CLUSTER-RATE.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from ..machine import machine
from .__main__ import CODECS
from .prepare import ROOT, Shape, Workshop, emulate, mpirun, run_race
from .results import BOUND, OURS, REPLANNED, CellResult, in_order

RESULTS = ROOT / "benchmarks/results/replan"
STALE, FRESH = OURS, "espresso profiled there"
TRACED_STEPS = 40


def main() -> None:
    """Run, replan and race at every rate; print what came out."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.race.replan", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="gpt2-30m")
    parser.add_argument("--cluster", type=Shape.parse, default=Shape(2, 1))
    parser.add_argument("--made-for", default="1gbit")
    parser.add_argument("--run-at", default="100mbit,200mbit,1gbit")
    parser.add_argument("--thrift", type=float, default=0.01)
    parser.add_argument("--budget-s", type=float, default=60.0)
    parser.add_argument("--work", type=Path, default=ROOT / ".race")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    workshop = Workshop(given.work.resolve(), CODECS, given.thrift)
    given.out.mkdir(parents=True, exist_ok=True)
    made = [at_rate(rate, given, workshop) for rate in given.run_at.split(",")]
    for cell in in_order(made):
        print(f"{cell.name}, plan made for {given.made_for}:")
        for name, each in cell.variants.items():
            predicted = "" if each.predicted_s is None else f", predicted {each.predicted_s:.3f}"
            print(f"  {name:24s} {each.median_s:.3f} s{predicted}")


def at_rate(rate: str, given: argparse.Namespace, workshop: Workshop) -> CellResult:
    """One rate."""
    model, shape = given.model, given.cluster
    stale = workshop.plans(model, shape, given.made_for, [OURS])[OURS]
    fresh = workshop.plans(model, shape, rate, [OURS])[OURS]
    name = f"{model}-{shape}-{given.made_for}-at-{rate}"
    replanning = workshop.replanning(model, shape, given.made_for, stale, name)
    settings = {"ESPRESSO_CONFIG": stale, "ESPRESSO_TRACE_RUN": replanning["traces"], "ESPRESSO_GUARD": "0"}
    script = (sys.executable, "benchmarks/race/train.py", "--model", model, "--steps", str(TRACED_STEPS))
    emulate(shape, rate, *mpirun(shape, settings), *script)
    subprocess.run(replanning["command"], check=True, timeout=600, cwd=ROOT)
    part = workshop.folder / f"part-{name}.json"
    plans = {STALE: stale, REPLANNED: replanning["plan"], FRESH: fresh}
    run_race(
        workshop.folder / f"job-{name}.json",
        model,
        shape,
        peers=[BOUND],
        ours=list(plans),
        steps_per_turn=3,
        least_rounds=3,
        most_rounds=9,
        budget_s=given.budget_s,
        cells=[{"rate": rate, "plans": plans, "out": str(part)}],
        losses=None,
        loss_peers=[],
    )
    about = {"model": model, "nodes": shape.nodes, "ranks_per_node": shape.ranks_per_node, "machine": machine(), "rate": rate}
    cell = CellResult.model_validate({**about, **json.loads(part.read_text())})
    cell.save(given.out / f"{name}.json")
    return cell


if __name__ == "__main__":
    main()

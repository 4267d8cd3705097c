"""Prepare with the product's own commands, run, and write a file for each cell; or report."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from espresso_ds.core.config import EspressoBlock
from espresso_ds.core.plan import BLOCK, Plan, load_plan_file, save_plan_file
from espresso_ds.core.profile import ClusterProfile, CompressorProfile, ModelTrace
from espresso_ds.core.record import write_json
from espresso_ds.planner.build_pipeline import make_pipeline_plan

from ..machine import machine
from ..race.prepare import ROOT, Shape, Workshop, emulate, mpirun
from . import __doc__ as about
from .models import ds_config
from .report import report
from .results import OURS, CellResult

RESULTS = ROOT / "benchmarks/results/pipeline_speed"
CODECS = ("bf16", "quantize:bits=8", "quantize:bits=4", "topk_sampled:density=0.1")
BITS, TOPK = {"name": "quantize", "bits": 4}, {"name": "topk_sampled", "density": 0.1}
FIXED = {
    "as it is, overlapped": {},
    "4 bits": {"forward": BITS, "backward": BITS},
    "TopK 10%": {"forward": TOPK, "backward": TOPK},
}
"""Settings by hand beside the plan, for what overlap alone gives and for the bytes of single codecs."""


def main() -> None:
    """Run, or report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipeline_speed", description=(about or "").partition("\n")[0])
    parser.add_argument("report", nargs="?", choices=["report"])
    parser.add_argument("--models", default="text,image")
    parser.add_argument("--stages", default="2,4")
    parser.add_argument("--rates", default="100mbit,200mbit")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=ROOT / ".pipeline_speed", help="profiles and plans (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    if given.report:
        print(report(given.out))
        return
    workshop = Workshop(given.work.resolve(), CODECS, 0.0)
    given.out.mkdir(parents=True, exist_ok=True)
    for stages in map(int, given.stages.split(",")):
        for model in given.models.split(","):
            run(model, stages, given.rates.split(","), given, workshop)


def run(model: str, stages: int, rates: list[str], given: argparse.Namespace, workshop: Workshop) -> None:
    """All rates of one model with so many stages, each on a host of its own."""
    shape = Shape(stages, 1)
    trace = workshop.folder / f"trace-{model}-{stages}.json"
    if not trace.exists():
        script = ("benchmarks/pipeline_speed/train.py", "--model", model, "--stages", str(stages))
        emulate(shape, "none", "espresso", "trace", "--hostfile", "{hostfile}", "--steps", "12", "-o", str(trace), *script)
    plans: dict[str, Plan] = {}
    blocks: dict[str, dict[str, Any]] = {}
    for rate in rates:
        plan = workshop.folder / f"plan-{model}-{stages}-{rate}.json"
        made = make_pipeline_plan(
            ModelTrace.load(trace),
            ClusterProfile.load(workshop.cluster(shape, rate)),
            CompressorProfile.load(workshop.compressors(shape)),
            made_by="benchmarks.pipeline_speed",
            block=EspressoBlock(),
        )
        save_plan_file(plan, ds_config(model), EspressoBlock(), made)
        config, _, plans[rate] = load_plan_file(plan)
        blocks[rate] = {name: {"pipeline": settings} for name, settings in FIXED.items()} | {OURS: config[BLOCK]}
    out = workshop.folder / f"found-{model}-{stages}.json"
    job = workshop.folder / f"job-{model}-{stages}.json"
    write_json(job, {"model": model, "stages": stages, "rounds": given.rounds, "rates": blocks, "out": str(out)})
    emulate(shape, "none", *mpirun(shape), sys.executable, "-m", "benchmarks.pipeline_speed.rank", str(job), show=True)
    for rate, variants in json.loads(out.read_text()).items():
        decided = plans[rate].pipeline
        assert decided is not None
        variants[OURS]["predicted_s"] = plans[rate].predicted.planned_s
        variants["deepspeed"]["predicted_s"] = plans[rate].predicted.stock_s
        variants["as it is, overlapped"]["predicted_s"] = plans[rate].predicted.uncompressed_s
        cell = {"model": model, "stages": stages, "rate": rate, "machine": machine(), "rounds": given.rounds}
        cell |= {"decided": list(decided.why), "variants": variants}
        CellResult.model_validate(cell).save(given.out / f"{model}-{stages}-{rate}.json")


if __name__ == "__main__":
    main()

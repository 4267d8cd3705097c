"""`espresso prepare`: trace the script, profile cluster and codecs, decide, and write plan.json. Skips what it is given."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core.config import CompressorSettings, Constraints
from ..core.profile import ClusterProfile, CompressorProfile, ModelTrace
from ..core.record import FileRecord, check_output
from ..integrations import boot
from ..planner.pipeline import USUAL
from ..planner.tree import check_forbidden
from .job import Reporter
from .launching import add_cluster_arguments, add_launch_arguments
from .plan import add_plan_arguments, describe, read_ds_config, with_arguments, write_plan
from .profile import (
    add_compressor_arguments,
    alternative_settings,
    check_profile_asked_for,
    compressor_settings,
    describe_cluster,
    describe_compressors,
    profile_cluster,
    profile_compressors,
)
from .trace import describe as describe_trace
from .trace import trace_script

FILES: dict[str, type[FileRecord]] = {"trace": ModelTrace, "cluster": ClusterProfile, "compressors": CompressorProfile}


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Declare the command's arguments."""
    parser = commands.add_parser("prepare", help="all in one: trace, profile, decide, write plan.json", description=__doc__)
    parser.add_argument("--ds-config", type=Path, required=True, help="the DeepSpeed JSON config that the script uses")
    add_cluster_arguments(parser)
    add_launch_arguments(parser)
    add_compressor_arguments(parser)
    add_plan_arguments(parser)
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps to time, after 3 to warm up (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="for the trace (default: %(default)s)")
    group = parser.add_argument_group("files from earlier runs, instead of measuring again")
    for kind in FILES:
        group.add_argument(f"--{kind}", type=Path, metavar="FILE")
    parser.add_argument("script", nargs=argparse.REMAINDER, help="train.py and its arguments")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Measure what is not given, plan, and write plan.json; the profiles go to a directory beside it."""
    check_profile_asked_for(args)
    config, block = read_ds_config(args.ds_config)
    compressor, alternatives = compressor_settings(args, block.compressor), alternative_settings(args, block.alternatives)
    check_before_measuring(args, (compressor, *alternatives), block.constraints)
    block = with_arguments(block.model_copy(update={"compressor": compressor, "alternatives": alternatives}), args)
    given: dict[str, Any] = {kind: record.load(path) for kind, record in FILES.items() if (path := getattr(args, kind))}
    directory = profile_directory(args.out)
    # Work beside the target, so that what is moved there at the end is whole whenever we are interrupted.
    with tempfile.TemporaryDirectory(dir=args.out.resolve().parent, prefix=".espresso-") as scratch, Reporter() as report:
        work = Path(scratch)
        try:
            trace = given.get("trace") or trace_script(args, work / "trace.json", report.part(0.0, 0.4, "trace"))
            trace.save(work / "trace.json")
            if trace.pipeline is not None and (compressor, alternatives) == (CompressorSettings(), ()):
                compressor, *rest = USUAL
                alternatives = tuple(rest)
                block = block.model_copy(update={"compressor": compressor, "alternatives": alternatives})
            cluster = given.get("cluster") or profile_cluster(
                args, work / "cluster.json", report.part(0.4, 0.75, "cluster"), trace.threads
            )
            cluster.save(work / "cluster.json")
            compressors = given.get("compressors") or profile_compressors(
                args,
                (compressor, *alternatives),
                work / "trace.json",
                work / "compressors.json",
                report.part(0.75, 0.95, "compressors"),
            )
            compressors.save(work / "compressors.json")
            plan = write_plan(args, config, block, trace, cluster, compressors, report=report.part(0.95, 1.0, "plan"))
        except BaseException:
            left = args.out.with_suffix(".unfinished")  # the profiles of a plan that is there stay as they are
            keep(work, left)
            print(f"espresso: no plan was written; what was measured, and logs, are in {left}", file=sys.stderr)
            raise
        keep(work, directory)
    print(f"trace:       {describe_trace(trace)}")
    print(f"cluster:     {describe_cluster(cluster)}", *cluster.remarks, sep="\n             ! ")
    print("compressors:", "\n             ".join(describe_compressors(compressors)))
    print(f"{args.out}: {describe(plan)}")
    print(f"why: `espresso explain {args.out}`; profiles are in {directory}")
    if not boot.hook_file_installed():
        print("This installation lacks the start-up hook (an editable one does): run `espresso install-hook` on every host.")


def check_before_measuring(args: argparse.Namespace, codecs: Sequence[CompressorSettings], constraints: Constraints) -> None:
    """Raise EspressoError at what would only come to light after minutes of measuring."""
    from ..compressors.registry import check  # brings torch

    check_output(args.out)
    check_forbidden(constraints)
    for settings in codecs:
        check(settings)
    if args.replicas is not None:
        ClusterProfile.load(args.replicas)


def profile_directory(out: Path) -> Path:
    """Where the profiles of a plan lie: `plan.profiles` beside `plan.json`."""
    return out.with_suffix(".profiles")


def keep(work: Path, directory: Path) -> None:
    """Move finished profiles and logs from `work` to `directory`, replacing older ones."""
    directory.mkdir(exist_ok=True)
    for file in sorted(work.iterdir()):
        if not file.name.startswith("."):
            shutil.move(file, directory / file.name)

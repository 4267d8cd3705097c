"""`espresso explain`: what a plan does to each tensor and why, what to expect, and a picture of the timelines."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..core.config import EspressoBlock
from ..core.plan import Plan, load_plan_file
from ..core.profile import ClusterProfile, CompressorProfile, ModelTrace
from ..core.record import write_json
from ..planner.build import timelines_of
from ..planner.chrome import to_chrome
from .console import wide_console
from .plan import describe
from .prepare import profile_directory


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Declare the command's arguments."""
    parser = commands.add_parser("explain", help="what was decided for each tensor and why", description=__doc__)
    parser.add_argument("plan", type=Path)
    parser.add_argument("tensor", nargs="?", help="only this tensor")
    parser.add_argument(
        "--profiles",
        type=Path,
        metavar="DIR",
        help="where trace.json, cluster.json and compressors.json lie (default: PLAN.profiles)",
    )
    parser.add_argument(
        "--picture", type=Path, metavar="PNG", help="draw the timelines of DeepSpeed, of overlap alone and of the plan"
    )
    parser.add_argument(
        "--chrome",
        type=Path,
        metavar="JSON",
        help="write the plan's timeline for chrome://tracing or Perfetto, the one before beside it",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the explanation, and draw the picture if asked. Raises FileError, MismatchError."""
    from ..planner.render import draw, explain, explain_path  # brings rich tables and, for pictures, matplotlib

    _, block, plan = load_plan_file(args.plan)
    console = wide_console()
    if plan.pipeline is not None:
        print(describe(plan))
    if plan.pipeline is None or plan.tensors:
        console.print(explain(plan, args.tensor))
    directory = args.profiles or profile_directory(args.plan)
    wanted = [path for path in (args.picture, args.chrome) if path is not None]
    if not wanted and (args.tensor is not None or plan.pipeline is not None or not directory.is_dir()):
        return
    timelines = load_timelines(plan, directory, block)
    if args.tensor is None:
        console.print(explain_path(timelines["planned"]))
    if args.picture is not None:
        draw(timelines, args.picture)
    if args.chrome is not None:
        write_json(args.chrome, to_chrome(timelines))
    for path in wanted:
        print(path)


def load_timelines(plan: Plan, directory: Path, block: EspressoBlock) -> dict:
    """The plan's timelines, from the profiles in `directory`. Raises FileError, MismatchError."""
    return timelines_of(
        plan,
        ModelTrace.load(directory / "trace.json").without_stages("a picture of the timeline"),
        ClusterProfile.load(directory / "cluster.json"),
        CompressorProfile.load(directory / "compressors.json"),
        block.constraints,
    )

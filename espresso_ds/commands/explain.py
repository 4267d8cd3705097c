"""`espresso explain`: what a plan does to each tensor and why, what to expect, and a picture of the timelines."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from ..core.plan import Plan, load_plan_file
from ..core.profile import ClusterProfile, CompressorProfile, ModelTrace
from ..planner.build import timelines_of
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
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the explanation, and draw the picture if asked. Raises FileError, MismatchError."""
    from ..planner.render import draw, explain  # brings rich tables and, for pictures, matplotlib

    _, _, plan = load_plan_file(args.plan)
    Console().print(explain(plan, args.tensor))
    if args.picture is not None:
        draw(load_timelines(plan, args.profiles or profile_directory(args.plan)), args.picture)
        print(args.picture)


def load_timelines(plan: Plan, directory: Path) -> dict:
    """The plan's timelines, from the profiles in `directory`. Raises FileError, MismatchError."""
    return timelines_of(
        plan,
        ModelTrace.load(directory / "trace.json"),
        ClusterProfile.load(directory / "cluster.json"),
        CompressorProfile.load(directory / "compressors.json"),
    )

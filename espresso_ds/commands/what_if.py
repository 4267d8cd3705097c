"""`espresso what-if`: the step over the bandwidth between nodes, or over the number of nodes, and which of it is needed."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from .. import __version__
from ..core.config import EspressoBlock
from ..core.errors import FileError
from ..core.plan import Prediction, load_plan_file
from ..core.profile import ClusterProfile, CompressorProfile, ModelTrace
from ..planner.build import make_plan
from ..planner.what_if import Axis, doublings, geometric, inter_bit_per_s, what_if
from .console import wide_console
from .job import reporter
from .prepare import profile_directory

_UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_EXAMPLE = "such as 0.01..10 or 100mbit..10gbit"


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Declare the command's arguments."""
    parser = commands.add_parser(
        "what-if", help="which bandwidth is needed, what other numbers of nodes would give", description=__doc__
    )
    parser.add_argument("plan", type=Path, nargs="?", help="a plan.json whose profiles lie beside it, or else:")
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--cluster", type=Path)
    parser.add_argument("--compressors", type=Path)
    axis = parser.add_mutually_exclusive_group()
    axis.add_argument("--bandwidth", metavar="A..B", help=f"over the measured one or absolute, {_EXAMPLE} (default: 0.01..10)")
    axis.add_argument("--nodes", metavar="A..B", help="numbers of nodes, such as 1..1024")
    parser.add_argument("--points", type=int, default=13, help="how many bandwidths (default: %(default)s)")
    parser.add_argument(
        "--target", type=float, default=0.95, help="share of compute-only speed to ask for (default: %(default)s)"
    )
    parser.add_argument(
        "--worth", type=float, default=0.01, help="share of the step that compression must save (default: %(default)s)"
    )
    parser.add_argument("--flat", action="store_true", help="no two-level schemes inside and between nodes")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="draw the curve")
    parser.add_argument("--json", action="store_true", help="print the curve and the answers as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Plan for every point, and print. Raises FileError."""
    from ..planner.pictures import check_picture  # brings matplotlib
    from ..planner.what_if_render import draw, table

    if args.picture is not None:
        check_picture(args.picture)
    block, trace, cluster, compressors = load(args)
    axis, values = values_of(args, cluster)
    plan_for = planner(trace, compressors, block, flat=args.flat)
    asked = {"model": trace.model, "target": args.target, "worth": args.worth}
    with reporter(silent=args.json) as report:
        found = what_if(cluster, axis, values, plan_for, **asked, progress=report)
    if args.json:
        print(found.model_dump_json(indent=1))
    else:
        wide_console().print(table(found))
    if args.picture is not None:
        draw(found, args.picture)
        if not args.json:
            print(args.picture)


def load(args: argparse.Namespace) -> tuple[EspressoBlock, ModelTrace, ClusterProfile, CompressorProfile]:
    """What to plan with: the plan's block or the defaults, and the profiles beside the plan or those given. Raises FileError."""
    block = EspressoBlock()
    given = {"trace": args.trace, "cluster": args.cluster, "compressors": args.compressors}
    if args.plan is not None:
        _, block, _ = load_plan_file(args.plan)
        given = {kind: file or profile_directory(args.plan) / f"{kind}.json" for kind, file in given.items()}
    if missing := [f"--{kind}" for kind, file in given.items() if file is None]:
        raise FileError(f"nothing to start from: give a plan.json whose profiles lie beside it, or {', '.join(missing)}")
    trace, cluster = ModelTrace.load(given["trace"]).without_stages("what-if"), ClusterProfile.load(given["cluster"])
    return block, trace, cluster, CompressorProfile.load(given["compressors"])


def values_of(args: argparse.Namespace, cluster: ClusterProfile) -> tuple[Axis, list[float]]:
    """What varies and its values. Raises FileError at what is no range, or an absolute one for a link that was not measured."""
    if args.nodes is not None:
        ends = re.fullmatch(r"(\d+)\.\.(\d+)", args.nodes)
        if ends is None:
            raise FileError(f"--nodes {args.nodes}: not a range; write two numbers, such as 1..1024")
        return "nodes", [float(nodes) for nodes in doublings(int(ends[1]), int(ends[2]))]
    low, dots, high = (args.bandwidth or "0.01..10").partition("..")
    if not dots:
        raise FileError(f"--bandwidth {args.bandwidth}: not a range; write two ends, {_EXAMPLE}")
    return "bandwidth", geometric(_over_measured(low, cluster), _over_measured(high, cluster), args.points)


def _over_measured(end: str, cluster: ClusterProfile) -> float:
    """One end of a range of bandwidths as a factor of the measured one."""
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)(kbit|mbit|gbit)?", end)
    if found is None:
        raise FileError(f"--bandwidth: {end!r} is neither a factor nor a rate; write two ends, {_EXAMPLE}")
    value, unit = float(found[1]), found[2]
    if unit is None:
        return value
    measured = inter_bit_per_s(cluster)
    if measured is None:
        raise FileError(f"--bandwidth: {end} has no measured rate to be compared with; give factors, such as 0.01..10")
    return value * _UNITS[unit] / measured


def planner(
    trace: ModelTrace, compressors: CompressorProfile, block: EspressoBlock, *, flat: bool
) -> Callable[[ClusterProfile], Prediction]:
    """Plans this model with these codecs for any cluster: as many ranks as it has, each computing as it was traced."""
    constraints = block.constraints.model_copy(update={"flat_only": True}) if flat else block.constraints

    def plan_for(cluster: ClusterProfile) -> Prediction:
        there = {"world_size": cluster.world_size, "ranks_per_node": cluster.ranks_per_node}
        return make_plan(
            trace.model_copy(update=there),
            cluster,
            compressors,
            made_by=f"espresso_ds {__version__} what-if",
            thrift=block.thrift,
            constraints=constraints,
            error_budget=block.error_budget,
        ).predicted

    return plan_for

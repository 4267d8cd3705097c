"""`espresso compare`: what the plan predicted beside what a run took, unit by unit, the largest differences first.

Record a run with `ESPRESSO_TRACE_RUN=run-trace.json` in its environment, or call `engine.espresso.save_trace(path)` in it. All
times are medians over the recorded steps of one rank. A routine counts from its issue (or from the end of the one that the link
served before it) until this rank has seen it complete, so what it waits for slower ranks is in it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..core.config import EspressoBlock
from ..core.plan import Plan, load_plan_file
from ..core.record import write_json
from ..core.run_trace import RunTrace
from ..planner.chrome import to_chrome
from ..planner.compare import compare
from ..planner.measured import measured_timeline, median_step, since_last_step
from ..planner.timeline import Timeline
from .console import wide_console
from .explain import load_timelines
from .prepare import profile_directory


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Declare the command's arguments."""
    parser = commands.add_parser("compare", help="prediction and measurement of a run side by side", description=__doc__)
    parser.add_argument("plan", type=Path)
    parser.add_argument("trace", type=Path, help="run-trace.json of a run under this plan")
    parser.add_argument("--top", type=_count, default=20, metavar="N", help="units to show (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print all units as JSON")
    parser.add_argument(
        "--chrome",
        type=Path,
        metavar="JSON",
        help="write the predicted and the measured step (the one of median length) for chrome://tracing or Perfetto",
    )
    parser.add_argument("--picture", type=Path, metavar="PNG", help="draw both timelines")
    parser.add_argument(
        "--profiles",
        type=Path,
        metavar="DIR",
        help="what the plan was made from, for --chrome and --picture (default: PLAN.profiles)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Compare and print, and write what was asked for. Raises FileError, MismatchError."""
    _, block, plan = load_plan_file(args.plan)
    recorded = RunTrace.load(args.trace)
    found = compare(plan, recorded, str(args.plan), str(args.trace))
    if args.chrome is not None or args.picture is not None:
        _write(args, _timelines(plan, recorded, args.profiles or profile_directory(args.plan), block))
    if args.json:
        print(found.model_dump_json(indent=1))
        return
    from ..planner.compare_render import table

    wide_console().print(table(found, args.top))
    for path in (args.chrome, args.picture):
        if path is not None:
            print(path)


def _timelines(plan: Plan, recorded: RunTrace, directory: Path, block: EspressoBlock) -> dict[str, Timeline]:
    step = median_step(recorded)
    return {
        "predicted": since_last_step(load_timelines(plan, directory, block)["planned"]),
        f"measured (rank {recorded.rank}, step {step.step})": measured_timeline(recorded, step),
    }


def _write(args: argparse.Namespace, timelines: dict[str, Timeline]) -> None:
    if args.chrome is not None:
        write_json(args.chrome, to_chrome(timelines))
    if args.picture is not None:
        from ..planner.render import draw  # brings matplotlib

        draw(timelines, args.picture)


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text}: show at least one unit")
    return count

"""`espresso replan`: a better plan from a measured run of the last one.

Record a run with `ESPRESSO_TRACE_RUN=run-{rank}.json` in its environment. What the profiles say of compute, codecs and links is
corrected so that it explains the run, written to PLAN2.profiles with the reasons (refit.json), and planned with again, under the
settings and constraints of the old plan. Where that would gain next to nothing the old decisions are kept.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .. import __version__
from ..core.errors import FileError
from ..core.plan import BLOCK, load_plan_file, save_plan_file
from ..core.profile import ClusterProfile, CompressorProfile, ModelTrace
from ..core.record import check_output
from ..core.run_trace import RunTrace
from ..planner.refit import Refitted, refit
from ..planner.refit_profiles import Profiles
from ..planner.replan import Replanned, replan
from .console import wide_console
from .job import Reporter
from .plan import describe, summary
from .prepare import profile_directory


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Declare the command's arguments."""
    parser = commands.add_parser("replan", help="a better plan from a measured run", description=__doc__)
    parser.add_argument("plan", type=Path, help="the plan that ran")
    parser.add_argument("--run", dest="runs", type=Path, nargs="+", required=True, metavar="JSON", help="traces of its ranks")
    for kind in Profiles._fields:
        parser.add_argument(f"--{kind}", type=Path, metavar="FILE", help=f"(default: PLAN.profiles/{kind}.json)")
    parser.add_argument("--uncompressed", action="store_true", help="no compression: only overlap with backward and fuse")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the new plan; its profiles go to a directory beside it")
    parser.add_argument("--json", action="store_true", help="print the refit and what the new plan promises as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Refit, plan again and write. Raises FileError, MismatchError, UnsupportedError."""
    config, block, plan = load_plan_file(args.plan)
    directory = profile_directory(args.out)
    if args.out.resolve() == args.plan.resolve() or directory.resolve() == profile_directory(args.plan).resolve():
        raise FileError(f"{args.out}: would overwrite the plan that ran or its profiles; name another file")
    check_output(args.out)
    profiles = _profiles(args)
    runs = {str(path): RunTrace.load(path) for path in args.runs}
    found = refit(plan, profiles, runs, str(args.plan))
    with Reporter() as report:
        new = replan(
            plan,
            found,
            made_by=f"espresso_ds {__version__}",
            uncompressed=args.uncompressed,
            thrift=block.thrift,
            constraints=block.constraints,
            error_budget=block.error_budget,
            progress=lambda stage, done, total: report(done / max(1, total), stage) if not args.json else None,
        )
    directory.mkdir(exist_ok=True)
    for kind, profile in found.profiles._asdict().items():
        profile.save(directory / f"{kind}.json")
    found.record.save(directory / "refit.json")
    save_plan_file(args.out, {key: value for key, value in config.items() if key != BLOCK}, block, new.plan)
    _show(args, found, new)


def _profiles(args: argparse.Namespace) -> Profiles:
    beside = profile_directory(args.plan)
    return Profiles(
        ModelTrace.load(args.trace or beside / "trace.json").without_stages("replanning"),
        ClusterProfile.load(args.cluster or beside / "cluster.json"),
        CompressorProfile.load(args.compressors or beside / "compressors.json"),
    )


def _show(args: argparse.Namespace, found: Refitted, new: Replanned) -> None:
    if args.json:
        promise = {**summary(new.plan), "kept": new.kept, "old_s": new.old_s}
        print(json.dumps({"refit": found.record.model_dump(mode="json"), "plan": promise}))
        return
    from ..planner.refit_render import table

    wide_console().print(table(found.record))
    print(f"{args.out}: {describe(new.plan)}")
    if new.kept:
        print("The old decisions are kept: new ones would gain no more than is within the noise, or might lose.")
    else:
        print(f"The old decisions would take {new.old_s:.3f} s by the same corrections.")
    print(f"profiles and refit.json are in {profile_directory(args.out)}")

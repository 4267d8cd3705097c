"""`espresso plan` and `espresso seal`: from profiles to plan.json, the user's DeepSpeed config with every decision in it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .. import __version__
from ..core.config import EspressoBlock
from ..core.errors import FileError
from ..core.option import Level, Option
from ..core.plan import BLOCK, PipelineDecision, Plan, load_json, plan_of, read_block, save_plan_file
from ..core.profile import ClusterProfile, CompressorProfile, ModelTrace
from ..core.record import check_output
from ..planner.build import make_plan
from ..planner.build_pipeline import make_pipeline_plan
from .job import Report, reporter


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Declare the commands' arguments."""
    parser = commands.add_parser("plan", help="decide from profiles, and write plan.json", description=__doc__)
    parser.add_argument("--ds-config", type=Path, required=True, help="the DeepSpeed JSON config of the training")
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--cluster", type=Path, required=True)
    parser.add_argument("--compressors", type=Path, required=True)
    add_plan_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print what the plan promises as JSON")
    parser.set_defaults(run=run)
    seal = commands.add_parser("seal", help="accept a plan that was edited by hand")
    seal.add_argument("plan", type=Path)
    seal.set_defaults(run=run_seal)


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of planning itself."""
    parser.add_argument("--uncompressed", action="store_true", help="no compression: only overlap with backward and fuse")
    thrift = "share of the fastest plan's step to give for leaving uncompressed what compression helps least (default: 0.01)"
    parser.add_argument("--thrift", type=float, help=thrift)
    replicas = "of a PipelineModule: cluster profile of as many ranks as a stage has replicas, placed as those are"
    parser.add_argument("--replicas", type=Path, metavar="CLUSTER.JSON", help=replicas)
    parser.add_argument("--flat", action="store_true", help="no two-level schemes inside and between nodes")
    parser.add_argument("-o", "--out", type=Path, default=Path("plan.json"), help="(default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Plan and write the file."""
    config, block = read_ds_config(args.ds_config)
    block = with_arguments(block, args)
    check_output(args.out)
    profiles = ModelTrace.load(args.trace), ClusterProfile.load(args.cluster), CompressorProfile.load(args.compressors)
    with reporter(silent=args.json) as report:
        plan = write_plan(args, config, block, *profiles, report=report)
    print(json.dumps(summary(plan)) if args.json else f"{args.out}: {describe(plan)}")


def run_seal(args: argparse.Namespace) -> None:
    """Check an edited plan in all but its seal, and seal it anew."""
    config, block = read_ds_config(args.plan)
    plan = plan_of(block, str(args.plan), check_seal=False).sealed()
    plan.check(str(args.plan))
    save_plan_file(args.plan, config, block, plan)
    print(f"{args.plan}: sealed; its predicted times are those of the plan before the edit")


def read_ds_config(path: Path) -> tuple[dict[str, Any], EspressoBlock]:
    """The user's config and its espresso block, or the block's defaults. Raises FileError."""
    config = load_json(path, "DeepSpeed config", "your DeepSpeed script's documentation")
    if not isinstance(config, dict):
        raise FileError(f"{path}: a DeepSpeed config is a JSON object, not {type(config).__name__}")
    return config, read_block(config, str(path)) or EspressoBlock()


def with_arguments(block: EspressoBlock, args: argparse.Namespace) -> EspressoBlock:
    """The block with what the command line says of it. Raises FileError at a value out of range."""
    asked = block.model_dump()
    if args.thrift is not None:
        asked["thrift"] = args.thrift
    if args.flat:
        asked["constraints"]["flat_only"] = True
    return EspressoBlock.read(asked, "command line")


def write_plan(
    args: argparse.Namespace,
    config: dict[str, Any],
    block: EspressoBlock,
    trace: ModelTrace,
    cluster: ClusterProfile,
    compressors: CompressorProfile,
    *,
    report: Report,
) -> Plan:
    """Make the plan and write it into a copy of the config. Raises MismatchError, FileError."""
    made_by = f"espresso_ds {__version__}"
    if args.replicas is not None and trace.pipeline is None:
        raise FileError(
            f"--replicas {args.replicas} is for the stages of a PipelineModule, and the trace is of none; leave it out"
        )
    if trace.pipeline is not None:
        replicas = None if args.replicas is None else ClusterProfile.load(args.replicas)
        how = {"made_by": made_by, "block": block, "uncompressed": args.uncompressed, "replicas": replicas}
        plan = make_pipeline_plan(trace, cluster, compressors, **how)
        block = block.model_copy(update={"pipeline": None})  # the plan has it
    else:
        plan = make_plan(
            trace,
            cluster,
            compressors,
            made_by=made_by,
            uncompressed=args.uncompressed,
            thrift=block.thrift,
            constraints=block.constraints,
            error_budget=block.error_budget,
            progress=lambda stage, done, total: report(done / max(1, total), stage),
        )
    save_plan_file(args.out, {key: value for key, value in config.items() if key != BLOCK}, block, plan)
    return plan


def summary(plan: Plan) -> dict[str, Any]:
    """What a plan promises, for scripts: seconds, bytes, counts and ratios."""
    predicted = plan.predicted
    lossy = [tensor for tensor in plan.tensors if Option.parse(tensor.option).compresses]
    return {
        **predicted.model_dump(mode="json"),
        "speedup_over_stock": predicted.stock_s / predicted.planned_s,
        "speedup_over_uncompressed": predicted.uncompressed_s / predicted.planned_s,
        "certified_gap": predicted.gap,
        "tensors": len(plan.tensors),
        "units": len(plan.units()),
        "compressed_tensors": len(lossy),
        "compressed_numel": sum(tensor.numel for tensor in lossy),
        "hierarchical_tensors": sum(Option.parse(tensor.option).levels != {Level.FLAT} for tensor in plan.tensors),
        "seal": plan.seal,
    }


def describe(plan: Plan) -> str:
    """What a plan promises, in a line."""
    predicted = plan.predicted
    if plan.pipeline is not None:
        return _describe_pipeline(plan, plan.pipeline)
    compressed = sum(Option.parse(tensor.option).compresses for tensor in plan.tensors)
    gain = predicted.stock_s / predicted.planned_s
    if not compressed:
        return (
            f"nothing compressed; expected step {predicted.planned_s:.3f} s by overlap alone, not {predicted.stock_s:.3f} s "
            f"({gain:.2f}x), {predicted.compute_s:.3f} s without any synchronisation"
        )
    return (
        f"{compressed} of {len(plan.tensors)} tensors compressed; expected step {predicted.planned_s:.3f} s instead of "
        f"{predicted.stock_s:.3f} s ({gain:.2f}x), {predicted.compute_s:.3f} s without any synchronisation"
    )


def _describe_pipeline(plan: Plan, pipeline: PipelineDecision) -> str:
    predicted = plan.predicted
    compressed = sum(Option.parse(tensor.option).compresses for tensor in plan.tensors)
    gradients = f", {compressed} of {len(plan.tensors)} gradients compressed" if plan.tensors else ""
    head = (
        f"{pipeline.stages} stages{gradients}; expected step {predicted.planned_s:.3f} s instead of {predicted.stock_s:.3f} s "
        f"({predicted.stock_s / predicted.planned_s:.2f}x), {predicted.compute_s:.3f} s if nothing had to cross"
    )
    return "\n  ".join([head, *pipeline.why])

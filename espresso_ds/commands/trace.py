"""`espresso trace`: sizes and ready times of the gradients of the user's own script, or of a Hugging Face model."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ..core.errors import FileError, UnsupportedError
from ..core.profile import ModelTrace
from ..core.record import check_output, written_elsewhere
from ..integrations import boot
from ..profiler.mpi_launch import read_hostfile
from ..profiler.mpi_world import SRUN
from .as_rank import rank_variables
from .job import JobError, Report, Reporter, run_job
from .launching import add_cluster_arguments, add_launch_arguments, go_on_in_place, one_of_many, script_command


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Declare the command's arguments."""
    parser = commands.add_parser("trace", help="time the gradients of a script or of a Hugging Face model", description=__doc__)
    add_cluster_arguments(parser)
    add_launch_arguments(parser)
    parser.add_argument("--ds-config", type=Path, help="DeepSpeed JSON config for a script that names none itself")
    parser.add_argument("-o", "--out", type=Path, default=Path("trace.json"), help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps to time, after 3 to warm up (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="(default: %(default)s)")
    group = parser.add_argument_group("a Hugging Face model instead of a script (one process, random tokens, no DeepSpeed)")
    group.add_argument("--hf-model", metavar="NAME", help="model directory, config.json or name")
    group.add_argument("--batch", type=int, default=8, help="(default: %(default)s)")
    group.add_argument("--sequence", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("script", nargs=argparse.REMAINDER, help="train.py and its arguments")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Trace and write the file."""
    if not args.hf_model and (found := one_of_many(args)):
        _check_script(args)
        addresses = rank_variables(os.environ) if found.by == SRUN else {}
        go_on_in_place(found, ["-u", *args.script], {**_environment(args, args.out), **addresses})
    if args.hf_model:
        _check_steps(args)
        check_output(args.out)
        from ..integrations.hf_trace import trace_hf_model

        with Reporter() as report:
            shape = _shape(args)
            trace_hf_model(args.hf_model, args.batch, args.sequence, args.steps, *shape, report).save(args.out)
    else:
        with Reporter() as report:
            trace_script(args, args.out, report)
    print(f"{args.out}: {describe(ModelTrace.load(args.out))}")


def trace_script(args: argparse.Namespace, out: Path, report: Report) -> ModelTrace:
    """Run the script under the tracer until it has timed `args.steps` steps.

    Raises:
        FileError: no script is given, or it ended before the tracer had its steps.
        JobError: the script failed.
    """
    _check_script(args)
    command, log = script_command(args, args.script), out.with_suffix(".log")
    with written_elsewhere(out) as fresh:
        try:
            run_job(command, log, report, _environment(args, fresh), args.timeout)
        except JobError as error:
            if not fresh.exists():
                raise
            # The ranks had all that was to be measured: gloo's threads, for one, may abort the end of an interpreter.
            print(f"espresso: the trace is complete, but the script failed while it was ended: {error}", file=sys.stderr)
        if not fresh.exists():
            raise FileError(
                f"the script ended without {args.steps + 3} optimizer steps on a DeepSpeed engine; "
                f"train longer, or lower --steps; its output is in {log}"
            )
    return ModelTrace.load(out)


def _shape(args: argparse.Namespace) -> tuple[int, int]:
    """Ranks in all and on each host that a model is traced for."""
    if args.hostfile is None:
        return args.ranks or 1, args.ranks or 1
    hosts = read_hostfile(args.hostfile)
    slots = set(hosts.values())
    if len(slots) > 1 or args.ranks is not None:
        raise UnsupportedError(f"--hf-model takes a --hostfile with as many slots on every host, and no --ranks: {args.hostfile}")
    return sum(hosts.values()), slots.pop()


def _check_steps(args: argparse.Namespace) -> None:
    if args.steps < 1:
        raise FileError(f"--steps {args.steps}: time at least one step")


def _check_script(args: argparse.Namespace) -> None:
    if not args.script:
        raise FileError("which script? give it and its arguments last: `espresso trace [options] train.py ARGS`")
    _check_steps(args)
    if not boot.hook_file_installed():  # some ranks might then train on while others trace, and wait for each other
        raise UnsupportedError(f"{sys.prefix} has no start-up hook, so scripts are not traced; run `espresso install-hook`")


def _environment(args: argparse.Namespace, out: Path) -> dict[str, str]:
    """What tells the tracer in every rank what to do; a plan that the user's shell names is not run."""
    env = {"ESPRESSO_TRACE_OUT": str(out.resolve()), "ESPRESSO_TRACE_STEPS": str(args.steps)}
    if args.ds_config is not None:
        env["ESPRESSO_TRACE_CONFIG"] = str(args.ds_config.resolve())
    return env | {name: "" for name in ("ESPRESSO_PLAN_HASH", "ESPRESSO_CONFIG") if name in os.environ}


def describe(trace: ModelTrace) -> str:
    """One line about a trace."""
    return (
        f"{trace.model}, {len(trace.tensors)} tensors, {sum(t.numel for t in trace.tensors) / 1e6:.2f}M parameters on "
        f"{trace.world_size} ranks: {trace.compute_s:.3f} s a step without synchronisation, backward {trace.backward_s:.3f} s"
    )

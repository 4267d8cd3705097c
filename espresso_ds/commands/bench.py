"""`espresso bench net` and `espresso bench codec`: speed of routines and codecs beside what the link and memory allow."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import get_args

from pydantic import BaseModel

from ..core.config import CompressorSettings
from ..core.errors import FileError, SyncError, UnsupportedError, nearest
from ..core.option import Level
from ..core.record import check_output, write_json
from ..profiler.bench_report import BUS_FACTORS, DTYPES, FAULT, Backend, NetReport, NetSettings, read_report
from .bench_tables import UNITS, codec_tables, kernels_text, net_tables
from .console import wide_console
from .job import JobError, reporter, run_job
from .launching import add_cluster_arguments, one_of_many, ranks_command
from .profile import read_codec

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmg])i?)?b?", re.IGNORECASE)
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
_EXAMPLE = "such as 1KB..64MB or 4KB,1MB"
_MPI_DTYPES = ("float32", "float64", "int32", "uint8")
"""Of `DTYPES` those that both NumPy and MPI can add up."""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Declare the commands' arguments."""
    parser = commands.add_parser("bench", help="speed of the network's routines, or of codecs", description=__doc__)
    kinds = parser.add_subparsers(required=True, metavar="net|codec")
    net = kinds.add_parser("net", help="time, bandwidth and correctness of collective routines and links")
    add_cluster_arguments(net)
    net.add_argument(
        "--routines",
        default=",".join(BUS_FACTORS),
        metavar="NAME,...",
        help="(default: %(default)s); links are measured in any case",
    )
    net.add_argument("--sizes", default="1KB..16MB", metavar="A..B|LIST", help="of the larger buffer (default: %(default)s)")
    net.add_argument("--step", type=int, default=4, help="factor from one size of a range to the next (default: %(default)s)")
    net.add_argument("--level", default="", metavar="LEVEL,...", help="flat, intra, inter (default: all that there are)")
    net.add_argument("--backend", choices=get_args(Backend), help="(default: nccl where there is CUDA, else gloo); mpi: raw MPI")
    net.add_argument("--dtype", default="float32", metavar="DTYPE", help=f"one of {', '.join(DTYPES)} (default: %(default)s)")
    net.add_argument("--trials", type=int, default=10, help="(default: %(default)s)")
    net.add_argument(
        "--longest",
        type=float,
        default=2.0,
        metavar="SECONDS",
        help="leave out sizes beyond one that took longer (default: %(default)g)",
    )
    net.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="for everything (default: %(default)g)")
    net.add_argument("--unit", choices=tuple(UNITS), help="of bandwidths in the table (default: MB/s, or GB/s where it is fast)")
    net.add_argument("--json", type=Path, metavar="FILE", help="write the figures there; - prints them in place of the table")
    net.set_defaults(run=run_net)
    codec = kinds.add_parser("codec", help="encode and decode speed of codecs beside what memory allows")
    which = codec.add_mutually_exclusive_group()
    which.add_argument(
        "--compressor",
        nargs="+",
        action="extend",
        metavar="NAME[:KEY=VALUE]...",
        help="such as topk:density=0.05 (default: --all)",
    )
    which.add_argument("--all", action="store_true", help="all codecs of the registry")
    codec.add_argument("--sizes", default="64KB..16MB", metavar="A..B|LIST", help="of the fp32 input (default: %(default)s)")
    codec.add_argument("--step", type=int, default=16, help="factor from one size of a range to the next (default: %(default)s)")
    codec.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    codec.add_argument("--threads", type=int, help="of codecs and of `r += g` on the CPU (default: torch's number)")
    codec.add_argument("--trials", type=int, default=7, help="(default: %(default)s)")
    codec.add_argument("--json", type=Path, metavar="FILE", help="write the figures there; - prints them in place of the table")
    codec.set_defaults(run=run_codec)


def run_net(args: argparse.Namespace) -> None:
    """Measure, print and write. Raises FileError, UnsupportedError, SyncError, JobError; alike on all ranks where this is one."""
    settings = net_settings(args)
    _check_json(args.json)
    report = _as_a_rank(settings, args.json) if one_of_many(args) else _with_ranks(args, settings)
    if report is None:
        return
    if str(args.json) != "-":
        wide_console(highlight=False).print(*net_tables(report, args.unit), sep="\n")
    _write(report, args.json)
    if wrong := [row for row in report.rows if row.wrong]:
        row = wrong[0]
        raise SyncError(
            f"wrong results in {len(wrong)} of {len(report.rows)} cases: {row.wrong} elements of {row.routine}, {row.nbytes} "
            f"bytes, {row.where}; check {report.library}, network drivers and the hosts' memory before you train here"
        )


def _as_a_rank(settings: NetSettings, path: Path | None) -> NetReport | None:
    """Measure as one of the ranks that mpirun, srun or torchrun has started; the report on rank 0."""
    from ..profiler.bench_net import run_rank  # brings torch

    with reporter(silent=str(path) == "-") as report:
        measured, rank = run_rank(settings, report)
    return measured if rank == 0 else None


def _with_ranks(args: argparse.Namespace, settings: NetSettings) -> NetReport:
    """Start the ranks and read what rank 0 says."""
    if args.ranks == 1:
        raise UnsupportedError(f"--ranks {args.ranks}: it takes two ranks to talk; give at least 2")
    command = ranks_command(args, "espresso_ds.profiler.bench_net", settings.model_dump_json(exclude_none=True))
    log = Path(tempfile.mkdtemp(prefix="espresso-bench-")) / "ranks.log"
    keep = False
    try:
        with reporter(silent=str(args.json) == "-") as report:
            run_job(command, log, report, timeout_s=args.timeout)
        with log.open(errors="replace") as lines:
            return read_report(lines)
    except JobError:
        said = [line.partition(FAULT)[2].strip() for line in log.read_text(errors="replace").splitlines() if FAULT in line]
        if said:  # the ranks' own words, alike on all, say more than the launcher's
            raise UnsupportedError(said[0]) from None
        keep = True  # the message names the log
        raise
    finally:
        if not keep:
            shutil.rmtree(log.parent)


def run_codec(args: argparse.Namespace) -> None:
    """Measure, print and write. Raises FileError, UnsupportedError."""
    sizes = parse_sizes(args.sizes, args.step)
    _positive(args, "trials", "threads")
    _check_json(args.json)
    from ..compressors.registry import CODECS, resolve  # brings torch
    from ..profiler.bench_codec import bench_codecs

    names: Sequence[str] = args.compressor or tuple(CODECS)
    chosen = tuple(dict.fromkeys(resolve(_codec(text, CODECS)) for text in names))
    with reporter(silent=str(args.json) == "-") as told:
        report = bench_codecs(chosen, sizes, args.device, args.threads, args.trials, told)
    if str(args.json) != "-":
        console = wide_console(highlight=False)
        console.print(*kernels_text(report), *codec_tables(report), sep="\n")
    _write(report, args.json)


def net_settings(args: argparse.Namespace) -> NetSettings:
    """What the command line asks for. Raises FileError, UnsupportedError at what is no routine, level, size or number."""
    _positive(args, "trials", "longest", "timeout", "ranks")
    if args.dtype not in DTYPES:
        raise FileError(f"--dtype {args.dtype}: no such type{nearest(args.dtype, DTYPES)}")
    if args.backend == "mpi" and args.dtype not in _MPI_DTYPES:
        raise UnsupportedError(f"--backend mpi cannot add up {args.dtype}; choose --dtype {' or '.join(_MPI_DTYPES)}")
    return NetSettings(
        routines=tuple(_listed(args.routines, "routines", BUS_FACTORS)),
        sizes=parse_sizes(args.sizes, args.step),
        levels=tuple(map(Level, _listed(args.level, "level", tuple(Level)) if args.level else ())),
        backend=args.backend,
        dtype=args.dtype,
        trials=args.trials,
        longest_s=args.longest,
        timeout_s=args.timeout,
    )


def parse_sizes(text: str, step: int) -> tuple[int, ...]:
    """Bytes of `1KB..64MB`, ends included, or of a list such as `4KB,1MB`; ascending. K, M and G are powers of 1024.

    Raises:
        FileError: a size that is none or 0, a range whose ends are the wrong way round, a step below 2.
    """
    low, dots, high = text.partition("..")
    if not dots:
        return tuple(sorted({_size(part.strip(), text) for part in text.split(",")}))
    first, last = _size(low, text), _size(high, text)
    if first > last:
        raise FileError(f"--sizes {text}: the range is the wrong way round; write {high.strip()}..{low.strip()}")
    if step < 2:
        raise FileError(f"--step {step}: each size is so many times the one before; give at least 2")
    sizes = []
    while first < last:
        sizes.append(first)
        first *= step
    return (*sizes, last)


def _size(text: str, whole: str) -> int:
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise FileError(f"--sizes {whole}: {text!r} is no size; write sizes {_EXAMPLE}")
    nbytes = round(float(found[1]) * _UNITS[(found[2] or "").lower()])
    if nbytes < 1:
        raise FileError(f"--sizes {whole}: {text!r} is nothing to send or encode; the smallest size is 1B")
    return nbytes


def _listed(text: str, option: str, known: Iterable[str]) -> list[str]:
    """The names of a list, each once. Raises FileError at one that is not known."""
    names = list(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        if name not in known:
            raise FileError(f"--{option} {text}: {name!r} is not known{nearest(name, known)}")
    return names


def _codec(text: str, known: Iterable[str]) -> CompressorSettings:
    name = text.partition(":")[0]
    if name not in known:
        raise FileError(f"--compressor {text}: unknown codec {name!r}{nearest(name, known)}")
    return read_codec(text, "--compressor")


def _positive(args: argparse.Namespace, *options: str) -> None:
    for option in options:
        value = getattr(args, option)
        if value is not None and not value > 0:
            raise FileError(f"--{option} {value}: give a number above 0")


def _check_json(path: Path | None) -> None:
    if path is not None and str(path) != "-":
        check_output(path)


def _write(report: BaseModel, path: Path | None) -> None:
    if str(path) == "-":
        sys.stdout.write(report.model_dump_json(indent=1) + "\n")
    elif path is not None:
        write_json(path, report.model_dump(mode="json"))
        print(path)

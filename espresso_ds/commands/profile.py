"""`espresso profile cluster` and `espresso profile compressors`: measured over MPI, with the backend that training uses."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from ..core.config import STRENGTH, CompressorSettings
from ..core.errors import FileError, UnsupportedError
from ..core.people import people_seconds
from ..core.profile import ClusterProfile, CodecProfile, CompressorProfile
from ..core.record import written_elsewhere
from .cluster_tables import tables
from .console import wide_console
from .job import Report, Reporter, run_job
from .launching import add_cluster_arguments, go_on_in_place, one_of_many, ranks_command

_CODEC_TIMEOUT_S = 600.0
_CLUSTER, _COMPRESSORS = "espresso_ds.profiler.cluster", "espresso_ds.profiler.compressors_mpi"
"""What every rank runs."""
_GIVEN = (*STRENGTH, "feedback", "residual", "momentum", "clip")
"""Settings of a codec that the command line takes, by their own names."""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Declare the command's arguments."""
    parser = commands.add_parser("profile", help="measure the cluster or compressors", description=__doc__)
    kinds = parser.add_subparsers(required=True, metavar="cluster|compressors|show")
    cluster = kinds.add_parser("cluster", help="latency and bandwidth of links and collective routines")
    add_cluster_arguments(cluster)
    cluster.add_argument("-o", "--out", type=Path, default=Path("cluster.json"), help="(default: %(default)s)")
    cluster.add_argument("--picture", type=Path, metavar="PNG", help="draw what was measured and the lines fitted through it")
    cluster.set_defaults(run=run_cluster)
    show = kinds.add_parser("show", help="the tables of a cluster profile, and its picture")
    show.add_argument("file", type=Path, metavar="CLUSTER.JSON")
    show.add_argument(
        "--picture", type=Path, nargs="?", const=True, metavar="PNG", help="draw it as well (default: beside the file, as .png)"
    )
    show.set_defaults(run=run_show)
    compressors = kinds.add_parser("compressors", help="encode and decode seconds, payload bytes and error of codecs")
    add_cluster_arguments(compressors)
    add_compressor_arguments(compressors)
    compressors.add_argument("--trace", type=Path, help="measure at the tensor sizes of this trace as well")
    compressors.add_argument("-o", "--out", type=Path, default=Path("compressors.json"), help="(default: %(default)s)")
    compressors.set_defaults(run=run_compressors)


def add_compressor_arguments(parser: argparse.ArgumentParser) -> None:
    """Which codecs; what is not given comes from the config's espresso block, or else the codec's defaults."""
    group = parser.add_argument_group("compressor")
    group.add_argument(
        "--compressor", metavar="NAME", help="codec, such as topk, dgc, randomk, efsignsgd, quantize, fp8 (default: topk)"
    )
    for key in _GIVEN:
        field = CompressorSettings.model_fields[key]
        group.add_argument(f"--{key.replace('_', '-')}", metavar=_choices(field.annotation) or "N", help=field.description)
    group.add_argument(
        "--alternative",
        action="append",
        default=[],
        metavar="NAME[:KEY=VALUE]...",
        help="a further codec that single tensors may get, such as fp16:feedback=none or topk:density=0.1; repeatable "
        f"(keys: {', '.join((*_GIVEN, 'seed'))})",
    )


def _choices(annotation: object) -> str:
    """`a|b` for Literal["a", "b"], with or without None; empty for numbers."""
    return "|".join(filter(None, (part if isinstance(part, str) else _choices(part) for part in get_args(annotation))))


def check_profile_asked_for(args: argparse.Namespace) -> None:
    """Raise FileError if a profile of codecs is given and others are asked for: the plan would not have them."""
    asked = [key for key in ("compressor", *_GIVEN, "alternative") if getattr(args, key)]
    if args.compressors is not None and asked:
        raise FileError(
            f"--compressors {args.compressors} says which codecs there are, and --{asked[0].replace('_', '-')} asks for others; "
            "give one of the two"
        )


def compressor_settings(args: argparse.Namespace, base: CompressorSettings) -> CompressorSettings:
    """The settings from the command line over those of `base`. Raises FileError at a value out of range."""
    given = {key: value for key in _GIVEN if (value := getattr(args, key)) is not None}
    kept = base.model_dump()
    if args.compressor is not None:
        given["name"] = args.compressor
        kept = {
            key: value for key, value in kept.items() if key not in STRENGTH
        }  # that of another codec says nothing about this one
    return CompressorSettings.read({**kept, **given}, "compressor on the command line")


def alternative_settings(args: argparse.Namespace, base: Sequence[CompressorSettings]) -> tuple[CompressorSettings, ...]:
    """Those of `base` and then those of the command line, each once. Raises FileError at one that cannot be read."""
    return tuple(dict.fromkeys((*base, *(read_codec(text, "--alternative") for text in args.alternative))))


def read_codec(text: str, option: str) -> CompressorSettings:
    """The codec that `NAME[:KEY=VALUE]...` describes. Raises FileError, naming the option, at what cannot be read."""
    name, *pairs = text.split(":")
    given = {"name": name}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or key in given:
            raise FileError(f"{option} {text}: {pair!r} is not KEY=VALUE with a key of its own; write topk:density=0.1")
        given[key] = value
    return CompressorSettings.read(given, f"{option} {text}")


def run_cluster(args: argparse.Namespace) -> None:
    """Measure, write the file and show it. Raises JobError, FileError, UnsupportedError."""
    if found := one_of_many(args):
        if args.picture is not None:
            raise UnsupportedError(
                f"--picture {args.picture}: ranks that {found.by} started only measure; draw afterwards with "
                f"`espresso profile show {args.out} --picture {args.picture}`"
            )
        go_on_in_place(found, ["-m", _CLUSTER, *_cluster_arguments(args.out)])
    if args.picture is not None:
        from ..planner.pictures import check_picture  # matplotlib is for pictures only

        check_picture(args.picture)  # before anything is measured for it
    with Reporter() as report:
        profile = profile_cluster(args, args.out, report)
    _show(profile, args.picture)
    print(f"{args.out}: {describe_cluster(profile)}")


def run_show(args: argparse.Namespace) -> None:
    """Show a file, however long ago it was measured. Raises FileError."""
    _show(ClusterProfile.load(args.file), args.file.with_suffix(".png") if args.picture is True else args.picture)


def _show(profile: ClusterProfile, picture: Path | None) -> None:
    wide_console().print(tables(profile))
    if picture is not None:
        from ..planner.cluster_render import draw_fit

        draw_fit(profile, picture)
        print(f"drawn: {picture}")


def run_compressors(args: argparse.Namespace) -> None:
    """Measure and write the file."""
    settings = (compressor_settings(args, CompressorSettings()), *alternative_settings(args, ()))
    if found := one_of_many(args):
        go_on_in_place(found, ["-m", _COMPRESSORS, *_compressor_arguments(settings, args.trace, args.out)])
    with Reporter() as report:
        profile = profile_compressors(args, settings, args.trace, args.out, report)
    print(f"{args.out}:", *describe_compressors(profile), sep="\n  ")


def profile_cluster(args: argparse.Namespace, out: Path, report: Report, threads: int | None = None) -> ClusterProfile:
    """Measure the cluster with one process per rank, which has `threads` compute threads (default: as torch decides).

    Raises JobError, FileError, UnsupportedError.
    """
    with written_elsewhere(out) as fresh:
        run_job(ranks_command(args, _CLUSTER, *_cluster_arguments(fresh, threads)), out.with_suffix(".log"), report)
    return ClusterProfile.load(out)


def profile_compressors(
    args: argparse.Namespace, settings: Sequence[CompressorSettings], trace: Path | None, out: Path, report: Report
) -> CompressorProfile:
    """Measure each codec, once, on all ranks at once, as they will run it. Raises JobError, FileError, UnsupportedError."""
    with written_elsewhere(out) as fresh:
        command = ranks_command(args, _COMPRESSORS, *_compressor_arguments(settings, trace, fresh))
        run_job(command, out.with_suffix(".log"), report, timeout_s=_CODEC_TIMEOUT_S * len(dict.fromkeys(settings)))
    return CompressorProfile.load(out)


def _cluster_arguments(out: Path, threads: int | None = None) -> list[str]:
    return ["-o", str(out.resolve()), *([] if threads is None else ["--threads", str(threads)])]


def _compressor_arguments(settings: Sequence[CompressorSettings], trace: Path | None, out: Path) -> list[str]:
    wanted = [each.model_dump(mode="json", exclude_none=True) for each in dict.fromkeys(settings)]
    given = [] if trace is None else ["--trace", str(trace.resolve())]
    return ["-o", str(out.resolve()), "--compressors", json.dumps(wanted), *given]


def describe_cluster(profile: ClusterProfile) -> str:
    """One line about a cluster profile."""
    links = ", ".join(
        f"{level} {link.alpha_s * 1e3:.3g} ms, {8e-6 / link.beta_s_per_byte:.4g} Mbit/s"
        if link.beta_s_per_byte
        else f"{level} {link.alpha_s * 1e3:.3g} ms"
        for level, link in profile.links.items()
    )
    size = f"{profile.nodes} hosts x {profile.ranks_per_node} ranks"
    costs = f"contention {profile.contention:.2f}, handling {people_seconds(profile.handling_s)} a routine"
    return f"{size} over {profile.backend}: {links}; {costs}"


def describe_compressors(profile: CompressorProfile) -> list[str]:
    """One line about each codec of a compressor profile."""
    return list(map(_describe_codec, profile.codecs))


def _describe_codec(codec: CodecProfile) -> str:
    parts = [f"{codec.compressor.label}: relative error {codec.relative_error:.2g}"]
    for times in codec.devices:
        nbytes = 4 * times.numel[-1]
        parts.append(
            f"{times.device}: {nbytes / times.encode_s[-1] / 1e9:.2f} GB/s encoding, "
            f"{nbytes / times.decode_s[-1] / 1e9:.2f} GB/s decoding, payload {100 * times.payload_nbytes[-1] / nbytes:.2f}% "
            f"(at {times.numel[-1]} elements), contention {times.contention:.2f}"
        )
    return "; ".join(parts)

"""`espresso profile compressors` on every rank: all ranks of the cluster run each codec at once, and the slowest counts.

Ranks that share a host's cores and memory then measure what they will get in training. Started over MPI by the command line.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch.distributed as dist
from pydantic import Field, TypeAdapter

from ..compressors.threads import use_threads
from ..core.config import CompressorSettings
from ..core.errors import EspressoError, FileError
from ..core.profile import CodecTimes, CompressorProfile, ModelTrace
from ..core.progress import print_progress
from .compressors import geometric_sizes, profile_compressors
from .rendezvous import joined

_TIMEOUT_S = 120.0
_SETTINGS: TypeAdapter[list[CompressorSettings]] = TypeAdapter(Annotated[list[CompressorSettings], Field(min_length=1)])


def slowest(profiles: list[CompressorProfile]) -> CompressorProfile:
    """Element by element the longest time of any rank."""

    def longest(times: list[CodecTimes]) -> CodecTimes:
        return times[0].model_copy(
            update={
                "encode_s": tuple(map(max, zip(*(t.encode_s for t in times), strict=True))),
                "decode_s": tuple(map(max, zip(*(t.decode_s for t in times), strict=True))),
                "contention": max(t.contention for t in times),
            }
        )

    codecs = []
    for same in zip(*(profile.codecs for profile in profiles), strict=True):
        devices = tuple(longest(list(times)) for times in zip(*(codec.devices for codec in same), strict=True))
        codecs.append(same[0].model_copy(update={"devices": devices}))
    return profiles[0].model_copy(update={"codecs": tuple(codecs)})


def sizes_of(trace: ModelTrace) -> list[int]:
    """Sizes up to that of the whole model (fused into one buffer), with the largest tensor and its shards exactly."""
    total = sum(tensor.numel for tensor in trace.tensors)
    largest = max(tensor.numel for tensor in trace.tensors)
    crossing = set() if trace.pipeline is None else {n for each in trace.pipeline.boundaries for n in each.forward_numel}
    return sorted({*geometric_sizes(total), largest, -(-largest // trace.world_size), *crossing})


def main(argv: Sequence[str] | None = None) -> int:
    """Run one rank; returns the exit status. Rank 0 prints `@progress` lines and writes the profile."""
    parser = argparse.ArgumentParser(prog="python -m espresso_ds.profiler.compressors_mpi")
    parser.add_argument("-o", "--output", type=Path, required=True, help="where rank 0 writes the compressor profile")
    parser.add_argument("--compressors", required=True, help="list of settings as JSON")
    parser.add_argument("--trace", type=Path, help="model trace whose tensor sizes and thread count to measure with")
    arguments = parser.parse_args(argv)
    try:
        try:
            settings = _SETTINGS.validate_json(arguments.compressors)
        except ValueError as error:
            raise FileError(f"--compressors {arguments.compressors}: {error}") from None
        trace = ModelTrace.load(arguments.trace) if arguments.trace else None
        with joined(None, _TIMEOUT_S) as ranks:
            use_threads(ranks.device.type, ranks.ranks_per_node, trace.threads if trace else None)
            profile = profile_compressors(
                settings,
                sizes=sizes_of(trace) if trace else None,
                device=ranks.device,
                progress=print_progress if ranks.rank == 0 else None,
                threads=trace.threads if trace else None,
                barrier=dist.barrier,
            )
            profiles: list[CompressorProfile] = [profile] * ranks.world_size
            dist.all_gather_object(profiles, profile)
            if ranks.rank == 0:
                slowest(profiles).save(arguments.output)
    except EspressoError as error:
        print(f"espresso profile compressors: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

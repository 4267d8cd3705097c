"""`espresso profile compressors` on every rank: all ranks of the cluster run the codec at once, and the slowest counts.

Ranks that share a host's cores and memory then measure what they will get in training. Started over MPI by the command line.
"""

from __future__ import annotations

from ..core.profile import CodecTimes, CompressorProfile, ModelTrace


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

    devices = [longest(list(times)) for times in zip(*(profile.devices for profile in profiles), strict=True)]
    return profiles[0].model_copy(update={"devices": tuple(devices)})


def sizes_of(trace: ModelTrace) -> list[int]:
    """Sizes that codecs will meet: the largest tensor, its shards, and the whole model (fused)."""
    total = sum(tensor.numel for tensor in trace.tensors)
    largest = max(tensor.numel for tensor in trace.tensors)
    return sorted({largest, -(-largest // trace.world_size), total})

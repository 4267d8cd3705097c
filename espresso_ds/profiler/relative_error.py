"""What a codec loses, as one number: the share of a vector's squared norm that one encoding does not carry."""

from __future__ import annotations

import statistics

import torch

from ..compressors.base import Codec

_NUMEL = 1 << 18
_SEEDS = range(4)


def relative_error(codec: Codec) -> float:
    """|x - decode(encode(x))|^2 / |x|^2 of standard-normal x, float32 of 2^18 elements, without error feedback.

    The mean over four seeds, of the tensor and of the codec's random choices alike. For a contractive codec it is 1 - delta, with
    delta as in Karimireddy et al. (ICML 2019) but of a Gaussian x, not of the worst one. For an unbiased one it is the variance,
    which may exceed 1. Of signs without magnitude it tells little: it is that of an x which happens to have their scale.
    """
    return statistics.fmean(_of_one(codec, seed) for seed in _SEEDS)


def _of_one(codec: Codec, seed: int) -> float:
    x = torch.randn(_NUMEL, generator=torch.Generator().manual_seed(seed))
    payload = torch.empty(codec.payload_nbytes(_NUMEL), dtype=torch.uint8)
    decoded = torch.zeros_like(x)
    codec.encode(x, payload, seed)
    codec.decode_add(payload, decoded, seed)
    lost = torch.linalg.vector_norm(x.double() - decoded.double()).square() / torch.linalg.vector_norm(x.double()).square()
    return lost.item()

"""All codecs of the registry with the parameters that tests try, the data they are tried on, and what they promise."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch

from espresso_ds.compressors.base import Codec
from espresso_ds.compressors.registry import CODECS, make
from espresso_ds.core.config import CompressorSettings

VALUES = {
    "density": (0.001, 0.01, 0.3, 1.0),
    "bits": (1, 2, 3, 4, 5, 8),
    "range": ("minmax", "absmax"),
    "format": ("e4m3", "e5m2"),
    "vote": ("majority", "mean"),
    "warmup_steps": (0,),
}
CANNOT = {("qsgd", 1), ("fixed_point", 1)}
"""Values that a codec refuses: tested apart."""


def _variants(name: str) -> list[CompressorSettings]:
    parameters = CODECS[name].parameters
    every = [dict(zip(parameters, values, strict=True)) for values in itertools.product(*(VALUES[p] for p in parameters))]
    return [CompressorSettings.model_validate({"name": name, **each}) for each in every if (name, each.get("bits")) not in CANNOT]


def _id(settings: CompressorSettings) -> str:
    return "-".join([settings.name, *(str(getattr(settings, parameter)) for parameter in CODECS[settings.name].parameters)])


CASES = {_id(case): make(case.model_copy(update={"feedback": "none"})) for name in CODECS for case in _variants(name)}
"""Every codec with every combination of `VALUES`, by a name for people."""
FP32 = torch.finfo(torch.float32)


def normal(numel: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def new_payload(codec: Codec, numel: int) -> torch.Tensor:
    return torch.full((codec.payload_nbytes(numel),), 0xA5, dtype=torch.uint8)


def encoded(codec: Codec, x: torch.Tensor, seed: int = 1) -> torch.Tensor:
    payload = new_payload(codec, x.numel())
    codec.encode(x, payload, seed)
    return payload


def decoded(codec: Codec, payload: torch.Tensor, numel: int, seed: int = 1) -> torch.Tensor:
    out = torch.zeros(numel)
    codec.decode_add(payload, out, seed)
    return out


def kinds_of_data(numel: int) -> dict[str, torch.Tensor]:
    x = normal(numel)
    rows = x.clone()
    rows[: numel - numel // 20] = 0
    spike = torch.zeros(numel)
    spike[numel // 2] = -3.0
    return {
        "normal": x,
        "small": x * 1e-6,
        "zeros": torch.zeros(numel),
        "negative zeros": torch.full((numel,), -0.0),
        "equal": torch.full((numel,), -0.37),
        "mostly zero": rows,
        "one spike": spike,
        "subnormal": x * 1e-40,
        "huge": x.clamp(-1, 1) * FP32.max,
        "one sign": x.abs(),
        "many ties": x.round(),
        "wide": x * torch.logspace(-30, 30, numel),
    }


def error_bound(codec: Codec, p: np.ndarray) -> np.ndarray:
    """The largest error of each element of p (float64) that the codec's file states, but for fp32's own rounding."""
    size = np.abs(p)
    if codec.name == "quantize" and size.max() > 0.5 * FP32.max:  # grids that fp32 cannot hold are narrowed
        return size if codec.contractive else np.full_like(size, size.max())

    def largest(block: int) -> np.ndarray:
        """The largest magnitude of the block that each element is in."""
        return np.concatenate([np.full(len(part), part.max()) for part in np.split(size, range(block, len(size), block))])

    def norm(block: int) -> np.ndarray:
        return np.concatenate(
            [np.full(len(part), np.linalg.norm(part)) for part in np.split(size, range(block, len(size), block))]
        )

    def floating(bits: int, lowest: float, limit: float) -> np.ndarray:
        """Rounding to nearest with `bits` bits, down to steps of `lowest`, clipped at `limit`."""
        return np.minimum(np.maximum(np.maximum(2.0**-bits * size, lowest / 2), size - limit), size)

    match codec.name:
        case "identity":
            return np.zeros_like(size)
        case "fp16":
            return floating(11, 2.0**-24, 65504)
        case "bf16":
            return floating(8, 2.0**-133, float(torch.finfo(torch.bfloat16).max))
        case "fp8":
            bits, lowest, top = {"e4m3": (4, 2.0**-10, 448), "e5m2": (3, 2.0**-17, 57344)}[codec.format]
            return _or_flushed(
                np.minimum(np.maximum(2.0**-bits * size, lowest * largest(1024) / top), size), largest(1024) / top, size
            )
        case "fixed_point":
            top = 2 ** (codec.bits - 1) - 1
            scale = np.minimum(size.max() * (1 + 2.0**-10) + 2.0**-24, 65504)
            return np.maximum(np.minimum(size, scale / (2 * top)), size - 65504)
        case "natural" | "topk" | "topk_sampled" | "dgc" | "randomk":
            return size
        case "quantize" if codec.range == "absmax" and codec.bits == 1:
            return _or_flushed(largest(4096) / 2, largest(4096), size)
        case "quantize" if codec.range == "absmax":
            step = largest(4096) / (2 ** (codec.bits - 1) - 1)
            return _or_flushed(np.minimum(size, step / 2), step, size)
        case "quantize":
            parts = np.split(p, range(4096, len(p), 4096))
            span = np.concatenate([np.full(len(part), max(part.max(), 0) - min(part.min(), 0)) for part in parts])
            step = span / (2**codec.bits - 1)
            return _or_flushed(np.minimum(size, step / 2), step, size)
        case "qsgd" | "terngrad":
            step = (norm(512) if codec.name == "qsgd" else largest(512)) / codec.levels
            return _or_flushed(step, step, size)
        case "signsgd":
            return np.abs(size - 1)
        case "efsignsgd" | "onebit":  # both send means of the block's magnitudes
            return np.maximum(size, largest(4096))
    raise AssertionError(f"{codec.name} states no bound here")


def _or_flushed(bound: np.ndarray, step: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Blocks whose step fp32 cannot hold as a normal number are sent as zeros."""
    return np.where(step < FP32.tiny * (1 + 1e-6), np.maximum(bound, size), bound)


def lost_share(codec: Codec, numel: int) -> float:
    """The largest share of |p|^2 that a contractive codec loses, in the mean, of elements in the formats' normal range."""
    match codec.name:
        case "identity":
            return 0.0
        case "fp16" | "bf16":
            return 2.0 ** (-22 if codec.name == "fp16" else -16)
        case "fp8" | "quantize" | "fixed_point":
            return 1.0
        case "natural":
            return 1 / 8
        case "qsgd":
            return codec.variance_bound
        case "efsignsgd" | "onebit":
            return 1 - 1 / min(numel, 4096)
        case "topk":
            return 1 - (1 - 2.0**-16) * sent(codec, numel) / numel
        case "topk_sampled" | "dgc":
            return 1.0
        case "randomk":
            return 1 - 1 / math.ceil(numel / sent(codec, numel))
    raise AssertionError(f"{codec.name} states no bound here")


def sent(codec: Codec, numel: int) -> int:
    """How many elements a sparsifier sends."""
    return max(1, round(codec.density * numel))

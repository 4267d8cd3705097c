"""Single steps of feedback, and the codecs it is tested with."""

from __future__ import annotations

import pytest
import torch
from plain_codecs import Largest

from espresso_ds.compressors.registry import CODECS, make
from espresso_ds.core.config import CompressorSettings

SETTINGS = [CompressorSettings(name=name) for name in CODECS] + [
    CompressorSettings(name="quantize", bits=bits) for bits in (1, 2, 8)
]
REAL = [
    pytest.param(codec, id=f"{settings.name}{settings.bits or ''}")
    for settings in SETTINGS
    if (codec := make(settings)).contractive
]
ANY = [pytest.param(Largest(50), id="plain"), *REAL]
MODES = ("ef", "ef21", "dgc")
NUMEL = 5003


def gradient(step: int, numel: int = NUMEL) -> torch.Tensor:
    x = torch.randn(numel, generator=torch.Generator().manual_seed(step))
    x[: numel // 2 : 3] = 0
    return x


def step_of(memory, codec, x, seed=0, site="w"):
    """What receivers get of one step of one sender."""
    payload = torch.empty(codec.payload_nbytes(len(x)), dtype=torch.uint8)
    memory.encode(codec, x, payload, seed, site)
    out = torch.zeros(len(x))
    codec.decode_add(payload, out, seed)
    memory.decoded(out, site + "/out")
    return out


def held(memory) -> dict[str, torch.Tensor]:
    """Copies of all tensors by site and name."""
    sites = memory.state_dict()["sites"]
    return {f"{site}:{name}": tensor.clone() for site, tensors in sites.items() for name, tensor in tensors.items()}


def skip_unless_possible(codec, mode):
    if mode == "dgc" and not hasattr(codec, "encode_momentum"):
        pytest.skip(f"{codec.name} has no momentum")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)

"""All codecs by name. A new codec is a file and a line here; conformance tests, benchmark and profiler find it by this table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from espresso_ds.core.config import CompressorSettings
from espresso_ds.core.errors import FileError, nearest

from .base import Codec
from .cast import Bf16, Fp16
from .identity import Identity
from .quantize import Quantize
from .randomk import RandomK
from .sign import EFSignSGD
from .topk import TopK

PARAMETERS = ("density", "bits")
"""The settings that are parameters of some codecs and senseless for the others."""


@dataclass(frozen=True)
class Entry:
    """How to make a codec: `make(**parameters)`, the parameters it takes with their defaults, and a line for people."""

    make: Callable[..., Codec]
    about: str
    defaults: Mapping[str, float | int] = field(default_factory=dict)


CODECS: Mapping[str, Entry] = MappingProxyType(
    {
        "identity": Entry(Identity, "raw fp32"),
        "fp16": Entry(Fp16, "cast to half precision"),
        "bf16": Entry(Bf16, "cast to bfloat16"),
        "topk": Entry(TopK, "the largest elements, with 16-bit indices", {"density": 0.01}),
        "randomk": Entry(RandomK, "random elements, chosen alike on all ranks", {"density": 0.01}),
        "efsignsgd": Entry(EFSignSGD, "signs and the mean magnitude"),
        "quantize": Entry(Quantize, "a few bits per element, uniform in the range of each block", {"bits": 4}),
    }
)


def make(settings: CompressorSettings) -> Codec:
    """Return the codec that the settings describe.

    Raises:
        FileError: an unknown name, or a parameter that this codec does not have.
    """
    entry = CODECS.get(settings.name)
    if entry is None:
        raise FileError(f"compressor: unknown codec {settings.name!r}{nearest(settings.name, CODECS)}")
    given = {name: value for name in PARAMETERS if (value := getattr(settings, name)) is not None}
    for name, value in given.items():
        if name not in entry.defaults:
            takes = f"it takes {', '.join(entry.defaults)}" if entry.defaults else "it takes no parameters"
            raise FileError(f"compressor: {settings.name} has no {name} (given: {value}); {takes}; remove {name!r}")
    return entry.make(**{**entry.defaults, **given})

"""All codecs by name. A new codec is a file and a line here; conformance tests, benchmark and profiler find it by this table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from espresso_ds.core.config import STRENGTH, CompressorSettings, FeedbackMode
from espresso_ds.core.errors import FileError, nearest
from espresso_ds.core.memory import check_memory

from .base import Codec
from .cast import Bf16, Fp16
from .dgc import DGC
from .fixed_point import FixedPoint
from .fp8 import Fp8
from .identity import Identity
from .natural import Natural
from .onebit import OneBit
from .powersgd import PowerSGD
from .qsgd import QSGD
from .quantize import Quantize
from .randomk import RandomK
from .sign import EFSignSGD
from .signsgd import SignSGD
from .terngrad import TernGrad
from .topk import TopK
from .topk_sampled import TopKSampled


@dataclass(frozen=True)
class Entry:
    """How to make a codec: `make(**parameters)`, a line for people, the feedback it is meant for, its parameters' defaults."""

    make: Callable[..., Codec]
    about: str
    feedback: FeedbackMode
    parameters: Mapping[str, float | int | str] = field(default_factory=dict)


CODECS: Mapping[str, Entry] = MappingProxyType(
    {
        "identity": Entry(Identity, "raw fp32", "none"),
        "fp16": Entry(Fp16, "cast to half precision", "ef"),
        "bf16": Entry(Bf16, "cast to bfloat16", "ef"),
        "fp8": Entry(Fp8, "eight bits of floating point, scaled by blocks", "ef", {"format": "e4m3"}),
        "natural": Entry(Natural, "powers of two, rounded at random", "none"),
        "quantize": Entry(Quantize, "a few bits per element, uniform in blocks", "ef", {"bits": 4, "range": "minmax"}),
        "fixed_point": Entry(FixedPoint, "a few bits per element, one scale for each column", "ef", {"bits": 8}),
        "qsgd": Entry(QSGD, "a few bits per element, rounded at random", "none", {"bits": 4}),
        "terngrad": Entry(TernGrad, "-s, 0 or s, rounded at random", "none"),
        "signsgd": Entry(SignSGD, "signs without magnitude", "none", {"vote": "majority"}),
        "efsignsgd": Entry(EFSignSGD, "signs and the mean magnitude of blocks", "ef"),
        "onebit": Entry(OneBit, "signs and the two means of blocks", "ef"),
        "topk": Entry(TopK, "the largest elements", "ef", {"density": 0.01}),
        "topk_sampled": Entry(TopKSampled, "the largest elements as far as a sample tells", "ef", {"density": 0.01}),
        "dgc": Entry(DGC, "the same with momentum and a warm-up", "dgc", {"density": 0.001, "warmup_steps": 0}),
        "randomk": Entry(RandomK, "random elements, chosen alike on all ranks", "ef", {"density": 0.01}),
    }
)


def check(settings: CompressorSettings) -> None:
    """Refuse settings that describe no codec, or feedback that its codec cannot have.

    Raises:
        FileError: an unknown name; a parameter that this codec does not have, or a value that it cannot have; error feedback
            around a codec that is not contractive, so that the residual would grow without limit; momentum in the feedback of a
            codec that takes none; a clip without such feedback.
        UnsupportedError: memory of a dtype that the feedback cannot have.
    """
    _codec(settings)


def make(settings: CompressorSettings) -> Codec:
    """Return the codec that the settings describe. Raises as `check` does."""
    return _codec(settings)


def resolve(settings: CompressorSettings) -> CompressorSettings:
    """Return the settings with the feedback filled in, as plans and profiles hold them. Raises as `check` does."""
    _codec(settings)
    return settings.model_copy(update={"feedback": _feedback(settings)})


def _codec(settings: CompressorSettings) -> Codec:
    entry = CODECS.get(settings.name)
    if settings.name == PowerSGD.name:
        raise FileError(
            "compressor: powersgd cannot be planned with, since what it sends depends on the shapes of tensors and not on their "
            'sizes; name another codec, or give tensors of a plan the option "P.gpu AR.flat Q.gpu AR.flat D.gpu" (cpu where the '
            "model is) and a compressor of that name, and accept the edit with `espresso seal`"
        )
    if entry is None:
        raise FileError(f"compressor: unknown codec {settings.name!r}{nearest(settings.name, CODECS)}")
    given = {name: value for name in STRENGTH if (value := getattr(settings, name)) is not None}
    for name, value in given.items():
        if name not in entry.parameters:
            takes = f"it takes {', '.join(entry.parameters)}" if entry.parameters else "it takes no parameters"
            raise FileError(f"compressor: {settings.name} has no {name} (given: {value}); {takes}; remove {name!r}")
    try:
        codec = entry.make(**{**entry.parameters, **given})
    except ValueError as error:
        raise FileError(f"compressor: {error}") from None
    _check_feedback(settings, codec)
    return codec


def _feedback(settings: CompressorSettings) -> FeedbackMode:
    return settings.feedback or CODECS[settings.name].feedback


def _check_feedback(settings: CompressorSettings, codec: Codec) -> None:
    mode = _feedback(settings)
    if mode in ("ef", "ef21", "aqsgd") and not codec.contractive:
        raise FileError(
            f'compressor: "feedback": "{mode}" around {codec}, which is not contractive, so that the residual would grow without '
            f'limit; set "feedback" to "none", or choose a codec such as {_contractive_like(settings)}'
        )
    if mode == "dgc" and not hasattr(codec, "encode_momentum"):
        takers = [name for name, entry in CODECS.items() if hasattr(entry.make, "encode_momentum")]
        raise FileError(
            f'compressor: "feedback": "dgc" with {settings.name}, which takes no momentum; set "feedback" to '
            f'"{CODECS[settings.name].feedback}", or choose {" or ".join(takers)}'
        )
    if settings.clip is not None and mode != "dgc":
        raise FileError(f'compressor: "clip" ({settings.clip:g}) belongs to "feedback": "dgc", not to "{mode}"; remove "clip"')
    check_memory(mode, settings.residual)


def _contractive_like(settings: CompressorSettings) -> str:
    """A codec that sends about as much and contracts."""
    return "efsignsgd or onebit" if settings.name in ("signsgd", "terngrad") or settings.bits == 1 else "quantize"

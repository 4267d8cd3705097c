"""The kernels of csrc/ for codecs that treat every element by itself: casts, SignSGD, fp8, natural compression.

Contracts and references: `cast.py`, `signsgd.py`, `fp8.py`, `natural.py`. Arguments are those of `Codec.encode` and
`Codec.decode_sum`, then the codec's own; they are not checked.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..core.native import declare
from .native_call import WORD, decoder, encoder

_PLAIN = ("fp16", "bf16", "e4m3", "e5m2", "natural")
_library = declare(
    {
        **{f"espresso_{name}_encode": (None, [WORD] * 7) for name in ("fp16", "bf16", "e4m3", "e5m2", "signsgd")},
        "espresso_natural_encode": (None, [WORD] * 8),
        **{f"espresso_{name}_decode_sum": (None, [WORD] * 6) for name in _PLAIN},
        "espresso_signsgd_decode_sum": (None, [WORD] * 7),
    }
)
_NAMES = (*_PLAIN, "signsgd") if _library is not None else ()
_encoders: dict[str, Callable[..., None]] = {name: encoder(getattr(_library, f"espresso_{name}_encode")) for name in _NAMES}
_decoders: dict[str, Callable[..., None]] = {name: decoder(getattr(_library, f"espresso_{name}_decode_sum")) for name in _NAMES}


def cast_encode(x: Tensor, residual: Tensor | None, kept: Tensor | None, payload: Tensor, format: str) -> None:
    """Rounding to `format`, "fp16" or "bf16"."""
    _encoders[format](x, residual, kept, payload)


def cast_decode_sum(rows: Tensor, out: Tensor, format: str, add: bool) -> None:
    """The sum of `rows` into `out`, or added to it."""
    _decoders[format](rows, out, add)


def signsgd_encode(x: Tensor, residual: Tensor | None, kept: Tensor | None, payload: Tensor) -> None:
    """The unit and the signs."""
    _encoders["signsgd"](x, residual, kept, payload)


def signsgd_decode_sum(rows: Tensor, out: Tensor, majority: bool, add: bool) -> None:
    """The sum of the signs in `rows` into `out`, or added to it; if `majority`, `len(rows)` times the sign of that sum."""
    _decoders["signsgd"](rows, out, add, majority)


def fp8_encode(x: Tensor, residual: Tensor | None, kept: Tensor | None, payload: Tensor, format: str) -> None:
    """Rounding to scaled `format`, "e4m3" or "e5m2"."""
    _encoders[format](x, residual, kept, payload)


def fp8_decode_sum(rows: Tensor, out: Tensor, format: str, add: bool) -> None:
    """The sum of the decoded `rows` into `out`, or added to it."""
    _decoders[format](rows, out, add)


def natural_encode(x: Tensor, residual: Tensor | None, kept: Tensor | None, payload: Tensor, seed: int) -> None:
    """Rounding to powers of two with the words that `random.words(seed, 0, n)` gives."""
    _encoders["natural"](x, residual, kept, payload, seed)


def natural_decode_sum(rows: Tensor, out: Tensor, add: bool) -> None:
    """The sum of the decoded `rows` into `out`, or added to it."""
    _decoders["natural"](rows, out, add)

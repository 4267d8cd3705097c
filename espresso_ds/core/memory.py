"""What the modes of feedback keep for each element, for whoever keeps it and for whoever plans within a limit."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from .config import FeedbackMode
from .errors import UnsupportedError

ResidualDtype = Literal["float32", "bfloat16"]

_SENDER: Mapping[FeedbackMode, tuple[str, ...]] = MappingProxyType(
    {"none": (), "ef": ("residual",), "ef21": ("estimate",), "dgc": ("velocity", "residual")}
)
_ITEM_BYTES: Mapping[ResidualDtype, int] = MappingProxyType({"float32": 4, "bfloat16": 2})


def check_memory(mode: FeedbackMode, residual_dtype: ResidualDtype) -> None:
    """Refuse a dtype that a mode cannot be right in.

    Raises:
        UnsupportedError: EF21 in bfloat16. A sender's estimate and the receivers' sum of estimates are rounded apart at every
            step, and nothing ever brings them together again. In fp32 they are 4e-6 of their size apart after 10,000 steps (three
            senders, measured, growing with the root of the steps); bfloat16 rounds 65,536 times as coarsely.
    """
    if mode == "ef21" and residual_dtype != "float32":
        raise UnsupportedError(
            f'"feedback": "ef21" with "residual": "{residual_dtype}": senders and receivers would drift apart by rounding; '
            'set "residual" to "float32", or "feedback" to "ef"'
        )


def sender_memory(mode: FeedbackMode, recompressed: bool = False) -> tuple[str, ...]:
    """Names of the tensors, each as large as what is compressed, that a sender keeps at one site.

    Args:
        mode: of the feedback.
        recompressed: whether what is compressed has been so before, on its way: "dgc" gives momentum to gradients only.
    """
    return _SENDER["ef"] if mode == "dgc" and recompressed else _SENDER[mode]


def receiver_memory(mode: FeedbackMode) -> tuple[str, ...]:
    """Names of the tensors, each as large as what is decoded, that a receiver keeps at one site."""
    return ("estimate",) if mode == "ef21" else ()


def feedback_bytes(mode: FeedbackMode, residual_dtype: ResidualDtype, reversible: bool, recompressed: bool = False) -> int:
    """Bytes that a sender keeps for each element of what it compresses at one site.

    Args:
        mode: of the feedback.
        residual_dtype: of the memory.
        reversible: whether steps may be taken back, as under a loss scaler.
        recompressed: as for `sender_memory`.

    Raises:
        UnsupportedError: see `check_memory`.
    """
    check_memory(mode, residual_dtype)
    return len(sender_memory(mode, recompressed)) * _ITEM_BYTES[residual_dtype] * (1 + reversible)


def receiver_bytes(mode: FeedbackMode, residual_dtype: ResidualDtype, reversible: bool) -> int:
    """Bytes that a receiver keeps for each element of what it decodes at one site; arguments and errors of `feedback_bytes`."""
    check_memory(mode, residual_dtype)
    return len(receiver_memory(mode)) * _ITEM_BYTES[residual_dtype] * (1 + reversible)


def must_reverse(mode: FeedbackMode, precision: str) -> bool:
    """Whether memory has to be brought back after a skipped step, which takes it twice.

    Under a loss scale steps are skipped all the time, with large gradients. In bf16 only NaN and Inf skip one: a residual
    survives that, while an estimate, which senders and receivers share, must not be wrong even once. In fp32 none is skipped.

    Args:
        mode: of the feedback.
        precision: "fp16", "bf16" or "fp32".
    """
    return mode != "none" and (precision == "fp16" or (precision == "bf16" and mode == "ef21"))

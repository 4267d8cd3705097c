"""The methods of the study: what each writes into the "espresso" block's "pipeline". Each example is compressed by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NONE = "none"
FORWARD_BITS, BACKWARD_BITS = (8, 4, 2), (8, 6, 4, 2)
TOPK_PERCENT = (50, 30, 20, 10, 5, 2)
EF_PERCENT = (20, 10, 5, 2)
AQ_PERCENT = (50, 30, 20, 10)
AQ_BITS = (4, 2)


@dataclass(frozen=True)
class Method:
    """A way to compress.

    Attributes:
        name: in results.
        family: heads its table.
        settings: of "pipeline"; None: plain DeepSpeed.
    """

    name: str
    family: str
    settings: Mapping[str, Any] | None


def quantize_name(forward: int, backward: int) -> str:
    """Name of uniform quantization with these bits."""
    return f"quantize fw{forward} bw{backward}"


def topk_name(percent: int, memory: str = "") -> str:
    """Name of TopK: `memory` is empty, `shared`, `ef`, `ef21` or `aqsgd`."""
    return f"{memory} topk {percent}%".strip()


def _quantize(bits: int, feedback: str = "none") -> dict[str, Any]:
    return {"name": "quantize", "bits": bits, "range": "minmax", "feedback": feedback}


def _topk(percent: int, feedback: str = "none") -> dict[str, Any]:
    return {"name": "topk", "density": percent / 100, "feedback": feedback}


def _method(name: str, family: str, **settings: object) -> Method:
    return Method(name, family, {"per_example": True, **settings})


def _all() -> list[Method]:
    return [
        Method(NONE, "none", None),
        *(
            _method(quantize_name(ahead, back), "Quantization", forward=_quantize(ahead), backward=_quantize(back))
            for ahead in FORWARD_BITS
            for back in BACKWARD_BITS
        ),
        *(_method(topk_name(k), "TopK, indices of its own each way", forward=_topk(k), backward=_topk(k)) for k in TOPK_PERCENT),
        *(
            _method(topk_name(k, "shared"), "TopK, gradients at the activations' indices", forward=_topk(k), shared_indices=True)
            for k in TOPK_PERCENT
        ),
        *(
            _method(topk_name(k, memory), "TopK with EF or EF21 both ways", forward=_topk(k, memory), backward=_topk(k, memory))
            for memory in ("ef", "ef21")
            for k in EF_PERCENT
        ),
        *(_method(topk_name(k, "aqsgd"), "AQ-SGD, activations only", forward=_topk(k, "aqsgd")) for k in AQ_PERCENT),
        *(_method(f"aqsgd fw{bits}", "AQ-SGD, activations only", forward=_quantize(bits, "aqsgd")) for bits in AQ_BITS),
    ]


METHODS: Mapping[str, Method] = {method.name: method for method in _all()}

"""What codecs share that treat every element, or every block of elements, by itself: the walk over a tensor.

On a CPU it goes span by span, so that what torch leaves between two operations stays in the cache and no memory is asked of
the system; on other devices all at once. Where a span ends changes no byte: it is a multiple of every block and of eight bits.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from .base import Codec

SPAN = 1 << 16
"""Elements of a span: 256 KiB of fp32 and what is computed from them stay in a second-level cache of 1 or 2 MiB."""
_FP32 = torch.finfo(torch.float32)


class Spanwise(Codec):
    """A codec in plain torch that writes and reads one span at a time."""

    @abstractmethod
    def _fields(self, payload: Tensor, numel: int) -> tuple[Tensor, ...]:
        """Views of the parts of a payload of `numel` elements, which is not empty."""

    @abstractmethod
    def _write(self, p: Tensor, fields: tuple[Tensor, ...], span: slice, seed: int) -> None:
        """Encode p, the elements `span` of the tensor: float32, not to be changed."""

    @abstractmethod
    def _read(self, fields: tuple[Tensor, ...], span: slice) -> Tensor:
        """Decode the elements `span`: float32, or what adds to float32 without rounding."""

    def encode(self, x: Tensor, payload: Tensor, seed: int, residual: Tensor | None = None, kept: Tensor | None = None) -> None:
        """Add the residual, write, and read back what was written for what is kept."""
        if x.numel() == 0:
            return
        fields = self._fields(payload, x.numel())
        for span in spans(x):
            p = x[span] if residual is None else x[span] + residual[span]
            self._write(p, fields, span, seed)
            if kept is not None:
                keep(p - self._read(fields, span), kept[span])

    def decode_add(self, payload: Tensor, out: Tensor, seed: int) -> None:
        """Read and add."""
        if out.numel() == 0:
            return
        fields = self._fields(payload, out.numel())
        for span in spans(out):
            out[span].add_(self._read(fields, span))

    def decode_sum(self, rows: Tensor, out: Tensor, seed: int) -> None:
        """Read and add all rows of a span before the next, while their sum is in the cache."""
        nbytes = self.payload_nbytes(out.numel())
        if nbytes == 0:
            return
        fields = [self._fields(row[:nbytes], out.numel()) for row in rows]
        for span in spans(out):
            total = out[span].zero_()
            for each in fields:
                total.add_(self._read(each, span))


def spans(x: Tensor) -> Iterator[slice]:
    """Slices of at most SPAN elements that cover a CPU tensor of one dimension; one slice for any other device."""
    step = SPAN if x.is_cpu else max(1, x.numel())
    for start in range(0, x.numel(), step):
        yield slice(start, min(start + step, x.numel()))


def keep(lost: Tensor, kept: Tensor) -> None:
    """Write p - decode (float32) into `kept` (float32 or bfloat16), with zeros for what is not finite."""
    lost = lost.nan_to_num(0.0, 0.0, 0.0)
    if kept.dtype != torch.float32:  # the largest fp32 would be rounded to Inf
        largest = torch.finfo(kept.dtype).max
        lost.clamp_(-largest, largest)
    kept.copy_(lost)


def poison(p: Tensor) -> Tensor:
    """0 if all of p is finite, else NaN: float32, shape (). Several times as fast as masks, which torch does not vectorise."""
    return (p - p).sum()


def covering(span: slice, block: int) -> slice:
    """Which blocks of `block` elements hold the elements of a span that begins with a block."""
    return slice(span.start // block, -(-span.stop // block))


def in_rows(p: Tensor, block: int) -> Tensor:
    """Shape (blocks, block), the last row filled up with zeros; a view where nothing is missing."""
    missing = -p.numel() % block
    return (torch.nn.functional.pad(p, (0, missing)) if missing else p).view(-1, block)


def grid(largest: Tensor, top: float) -> tuple[Tensor, Tensor]:
    """The step of each block so that `largest` (float32) is `top` steps, and its inverse.

    0 and 0 where the step would be subnormal: such blocks are sent as zeros. Finite blocks decode to finite values: at the very
    end of fp32's range the step is a millionth too short, and the largest values are clipped. NaN where `largest` is not finite.
    """
    step = (largest / top).clamp_(max=_FP32.max * (1 - 2.0**-20) / top)
    step = torch.where(largest.isfinite(), step, torch.nan).masked_fill_(largest / top < _FP32.tiny, 0.0)
    return step, torch.where(step == 0, 0.0, 1 / step)

"""Gradients that follow each other in a unit and lie apart in memory, so that kernels read them where they are."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure, addressof, c_float, c_int64, c_void_p
from itertools import accumulate

import torch
from torch import Tensor


class _Parts(Structure):
    """csrc/blocks.h says what they are."""

    _fields_ = (("at", c_void_p), ("ends", c_void_p), ("start", c_int64), ("factor", c_float))


class Parts:
    """`factor` times the elements of tensors, one after the other. Keeps the tensors alive, and those of which it is a slice.

    Args:
        tensors: float32, contiguous, on a CPU.
        factor: what every element is multiplied by as it is read.
    """

    device = torch.device("cpu")

    def __init__(self, tensors: Sequence[Tensor], factor: float = 1.0) -> None:
        self._tensors, self._factor = tensors, factor
        count = len(tensors)
        self._at = (c_void_p * count)(*[tensor.data_ptr() for tensor in tensors])
        self._ends = (c_int64 * count)(*accumulate(tensor.numel() for tensor in tensors))
        self._span = range(self._ends[count - 1] if count else 0)

    @staticmethod
    def fit(tensors: Sequence[Tensor]) -> bool:
        """Whether these can be parts."""
        return all(each.is_cpu and each.dtype is torch.float32 and each.is_contiguous() for each in tensors)

    def numel(self) -> int:
        """Number of elements."""
        return len(self._span)

    def __getitem__(self, span: slice) -> Parts:
        """Some of the elements, without a step."""
        piece = object.__new__(Parts)
        piece.__dict__.update(self.__dict__, _span=self._span[span])
        return piece

    def struct(self) -> Structure:
        """What kernels are given."""
        return _Parts(addressof(self._at), addressof(self._ends), self._span.start, self._factor)

    def release(self) -> None:
        """Let go of the tensors: nothing is read any more."""
        self._tensors = ()

    def gather(self) -> Tensor:
        """All elements in one tensor, float32, shape (numel,): the reference of what kernels read."""
        whole = torch.cat([tensor.reshape(-1) for tensor in self._tensors]) if self._tensors else torch.empty(0)
        return whole[self._span.start : self._span.stop] * self._factor

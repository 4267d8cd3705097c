"""PowerSGD: a matrix goes out as two thin factors (Vogels et al., NeurIPS 2019, algorithm 1).

For the gradient matrix M of a rank, n x m, and r columns Q (m x r) that all ranks share:

    P = M Q                     summed over ranks
    P = orthogonalise(P)
    Q = M^T P                   summed over ranks
    M ~ P Q^T                   the sum over ranks, projected on the span of P

Both steps are linear, so an allreduce adds the factors up and traffic does not grow with the number of ranks. It is biased and,
as P P^T is a projection, contractive: |M - P P^T M| <= |M|. One step of subspace iteration finds the leading directions only
roughly; the next one starts from the Q of the last (warm start) and so goes on refining them.

What we decided where the paper leaves it open:

- A tensor's first dimension are the rows and all others the columns. What has one dimension, or would save less than
  `least_saving`, travels uncompressed beside the factors P.
- Factors are stored transposed, (r, n) and (r, m) in row order. Then every product runs along the rows of M, at two to four times
  the speed, and QR works in place on the column order that it wants.
- Householder QR and not Gram-Schmidt: its columns are orthonormal also where P is zero or has dependent columns, so that P P^T
  is a projection whatever M is. With equal input it gives equal bits on CPUs or GPUs of one model with one number of threads.
- Q is orthogonalised too before it is used again. That changes no result in exact arithmetic and halves the digits that P loses.
- A Q of zeros, from a gradient of zeros, would make all later ones zeros. The columns before it are used again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core.config import STRENGTH, CompressorSettings
from ..core.errors import FileError

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Matrix:
    """One tensor that is sent as factors: where it begins in the unit, its size, and where its factors begin in their buffers."""

    start: int
    rows: int
    cols: int
    rank: int
    left_start: int
    right_start: int

    def of(self, x: Tensor) -> Tensor:
        """The matrix in the unit's buffer, (rows, cols)."""
        return x[self.start : self.start + self.rows * self.cols].view(self.rows, self.cols)

    def left(self, buffer: Tensor) -> Tensor:
        """P transposed, (rank, rows)."""
        return buffer[self.left_start : self.left_start + self.rank * self.rows].view(self.rank, self.rows)

    def right(self, buffer: Tensor) -> Tensor:
        """Q transposed, (rank, cols)."""
        return buffer[self.right_start : self.right_start + self.rank * self.cols].view(self.rank, self.cols)


@dataclass(frozen=True, slots=True)
class Plain:
    """Neighbouring elements that are sent as they are: where they begin in the unit and in the buffer of the factors P."""

    start: int
    left_start: int
    numel: int

    def of(self, x: Tensor) -> Tensor:
        """The elements in the unit's buffer."""
        return x[self.start : self.start + self.numel]

    def sent(self, left: Tensor) -> Tensor:
        """The elements among the factors."""
        return left[self.left_start : self.left_start + self.numel]


@dataclass(frozen=True)
class Layout:
    """How the tensors of a unit lie in two buffers: `left`, factors P and uncompressed elements, and `right`, factors Q.

    All functions take flat contiguous float32 tensors of one device: `x` of `numel` elements, `left` of `left_numel`, `right`
    and `basis` of `right_numel`.
    """

    matrices: tuple[Matrix, ...]
    plain: tuple[Plain, ...]
    numel: int
    left_numel: int
    right_numel: int

    def draw(self, basis: Tensor, seed: int) -> None:
        """Fill `basis` with the orthonormal columns to start from, alike on every device: normally distributed, then QR."""
        generator = torch.Generator().manual_seed(seed)
        basis.copy_(torch.randn(self.right_numel, generator=generator))
        for columns in self._bases(basis):
            orthonormalise(columns)

    def encode_left(self, x: Tensor, basis: Tensor, left: Tensor) -> None:
        """Overwrite `left` by P = M Q of every matrix and by what travels uncompressed."""
        for matrix in self.matrices:
            torch.mm(matrix.right(basis), matrix.of(x).t(), out=matrix.left(left))
        for plain in self.plain:
            plain.sent(left).copy_(plain.of(x))

    def encode_right(self, x: Tensor, left: Tensor, right: Tensor) -> None:
        """Orthogonalise the summed factors P in `left`, and overwrite `right` by Q = M^T P of every matrix."""
        for matrix in self.matrices:
            factor = matrix.left(left)
            orthonormalise(factor)
            torch.mm(factor, matrix.of(x), out=matrix.right(right))

    def residual(self, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """Turn every matrix in `x` into what its factors leave of it, M - P Q^T, the rest into zeros; returns `x`."""
        for matrix in self.matrices:
            matrix.of(x).addmm_(matrix.left(left).t(), matrix.right(right), alpha=-1)
        for plain in self.plain:
            plain.of(x).zero_()
        return x

    def decode(self, left: Tensor, right: Tensor, x: Tensor) -> None:
        """Overwrite `x` by P Q^T of every matrix and by what travelled uncompressed."""
        for matrix in self.matrices:
            torch.mm(matrix.left(left).t(), matrix.right(right), out=matrix.of(x))
        for plain in self.plain:
            plain.of(x).copy_(plain.sent(left))

    def renew(self, basis: Tensor, right: Tensor) -> None:
        """Turn the summed factors Q in `right` into orthonormal columns to start the next step from.

        Those that are zero or not finite are replaced by the ones in `basis`, with which this step began.
        """
        for used, factor in zip(self._bases(basis), self._bases(right), strict=True):
            norm = torch.linalg.vector_norm(factor)
            torch.where((norm > 0) & norm.isfinite(), factor, used, out=factor)
            orthonormalise(factor)

    def _bases(self, right: Tensor) -> Iterator[Tensor]:
        return (matrix.right(right) for matrix in self.matrices)


@dataclass(frozen=True)
class PowerSGD:
    """PowerSGD with its parameters fixed.

    Attributes:
        rank: columns of P and Q; fewer for a matrix with fewer rows or columns.
        least_saving: a matrix travels as factors if it has more than so many times their elements.
    """

    name: ClassVar[str] = "powersgd"
    rank: int = 4
    least_saving: float = 2.0

    @classmethod
    def of(cls, settings: CompressorSettings) -> PowerSGD:
        """PowerSGD as the settings describe it. Raises FileError at a parameter of other codecs."""
        foreign = [name for name in (*STRENGTH, "clip") if name != "rank" and getattr(settings, name) is not None]
        if foreign:
            raise FileError(f"compressor: powersgd takes rank, not {foreign[0]} ({getattr(settings, foreign[0])}); remove it")
        return cls() if settings.rank is None else cls(settings.rank)

    def layout(self, shapes: Sequence[Shape]) -> Layout:
        """Lay out a unit in which tensors of these shapes follow each other."""
        matrices: list[Matrix] = []
        plain: list[Plain] = []
        start = left = right = 0
        for shape in shapes:
            numel = math.prod(shape)
            rows, cols, rank = self.factors(shape)
            if rank:
                matrices.append(Matrix(start, rows, cols, rank, left, right))
                left, right = left + rank * rows, right + rank * cols
            elif numel:
                if plain and plain[-1].start + plain[-1].numel == start and plain[-1].left_start + plain[-1].numel == left:
                    plain[-1] = Plain(plain[-1].start, plain[-1].left_start, plain[-1].numel + numel)
                else:
                    plain.append(Plain(start, left, numel))
                left += numel
            start += numel
        return Layout(tuple(matrices), tuple(plain), start, left, right)

    def factors(self, shape: Shape) -> tuple[int, int, int]:
        """(rows, columns, rank) as which a tensor of this shape is sent; rank 0: uncompressed."""
        if len(shape) < 2:
            return math.prod(shape), 1, 0
        rows, cols = shape[0], math.prod(shape[1:])
        rank = min(self.rank, rows, cols)
        return rows, cols, rank if rank * (rows + cols) * self.least_saving < rows * cols else 0


def orthonormalise(factor: Tensor) -> None:
    """Replace the rows of `factor`, float32 of shape (r, n) with r <= n, by orthonormal ones that span theirs, in order.

    Rows that depend on those before them, zeros among them, become any that are orthogonal to all others. If any element is
    not finite, so are some of the result.
    """
    columns = factor.t()
    torch.linalg.qr(columns, out=(columns, factor.new_empty(factor.shape[0], factor.shape[0])))


def is_finite(x: Tensor) -> bool:
    """Whether all elements are finite. Allocates nothing of the size of `x`; on CUDA waits for the current stream."""
    return x.numel() == 0 or math.isfinite(torch.linalg.vector_norm(x, math.inf).item())

"""The alpha-beta line through measured times: seconds(nbytes) = alpha + beta * nbytes (E 4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..core.errors import EspressoError


class Line(NamedTuple):
    """A fitted line. `fit_error` is the median of |fit - measured| / measured."""

    alpha_s: float
    beta_s_per_byte: float
    fit_error: float


def fit_line(nbytes: Sequence[int], seconds: Sequence[float]) -> Line:
    """Fit alpha >= 0 and beta >= 0 by least squares of the relative errors.

    A relative error weighs a microsecond at 256 bytes as much as a second at 16 MB: small sizes set alpha and large ones beta,
    whereas plain least squares would see the large ones alone.

    Args:
        nbytes: sizes, at least two different ones, shape (n,).
        seconds: positive measured times, shape (n,).

    Raises:
        EspressoError: fewer than two different sizes, or a time that is not positive.
    """
    size, time = np.asarray(nbytes, float), np.asarray(seconds, float)
    if size.shape != time.shape or len(set(nbytes)) < 2 or not (time > 0).all():
        raise EspressoError(f"no line goes through sizes {list(nbytes)} and times {list(seconds)}: measure two sizes or more")
    columns = np.stack([1 / time, size / time], axis=1)  # (columns @ (alpha, beta) - 1) are the relative errors
    fits = [_least_squares(columns, free) for free in ((0, 1), (0,), (1,))]
    # A convex problem in two unknowns has its constrained minimum inside or on one of the two edges.
    best = min((fit for fit in fits if (fit >= 0).all()), key=lambda fit: float(np.sum((columns @ fit - 1) ** 2)))
    return Line(float(best[0]), float(best[1]), float(np.median(np.abs(columns @ best - 1))))


def _least_squares(columns: np.ndarray, free: tuple[int, ...]) -> np.ndarray:
    """Solve for the unknowns `free`, the other being zero."""
    scale = np.linalg.norm(columns[:, free], axis=0)  # alpha's and beta's columns differ by many powers of ten
    fit = np.zeros(2)
    fit[list(free)] = np.linalg.lstsq(columns[:, free] / scale, np.ones(len(columns)), rcond=None)[0] / scale
    return fit

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
    """Fit alpha >= 0 and beta >= 0: of all lines through the largest size, the one that is off by the smallest factors elsewhere.

    Times span many powers of ten. Least squares would see the large sizes alone, or with relative errors be drawn to any size
    that is faster than its neighbours. Here the largest size, which is nearly all bandwidth, is met exactly and so sets beta; a
    second measurement sets alpha, chosen so that the sum of |log(fit / measured)| is least, which weighs all sizes alike.

    Args:
        nbytes: sizes, at least two different ones, shape (n,).
        seconds: positive measured times, shape (n,).

    Raises:
        EspressoError: fewer than two different sizes, or a time that is not positive.
    """
    size, time = np.asarray(nbytes, float), np.asarray(seconds, float)
    if size.shape != time.shape or len(set(nbytes)) < 2 or not (time > 0).all():
        raise EspressoError(f"no line goes through sizes {list(nbytes)} and times {list(seconds)}: measure two sizes or more")
    last = int(np.argmax(size))
    lines = [(0.0, time[last] / size[last]), (time[last], 0.0)]
    for n, t in zip(size, time, strict=True):
        if n < size[last]:
            beta = (time[last] - t) / (size[last] - n)
            lines.append((t - beta * n, beta))
    alpha, beta = min((line for line in lines if min(line) >= 0), key=lambda line: _misfit(line, size, time))
    return Line(float(alpha), float(beta), float(np.median(np.abs(alpha + beta * size - time) / time)))


def _misfit(line: tuple[float, float], size: np.ndarray, time: np.ndarray) -> float:
    """Sum of the absolute logarithms of fit / measured."""
    return float(np.sum(np.abs(np.log((line[0] + line[1] * size) / time))))

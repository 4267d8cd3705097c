"""What codecs are said to lose, against what they lose of a Gaussian on paper."""

import math

import pytest
from scipy.stats import norm

from espresso_ds.compressors.registry import make
from espresso_ds.core.config import CompressorSettings
from espresso_ds.profiler.relative_error import relative_error


def beyond(density: float) -> float:
    """Share of a standard normal's squared norm that its largest magnitudes, a share `density` of all, do not hold."""
    threshold = norm.isf(density / 2)
    return 1 - 2 * (threshold * norm.pdf(threshold) + norm.sf(threshold))


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"name": "identity"}, 0.0),
        ({"name": "topk", "density": 0.01}, beyond(0.01)),
        ({"name": "topk", "density": 0.1}, beyond(0.1)),
        ({"name": "randomk", "density": 0.1}, 0.9),
        ({"name": "efsignsgd"}, 1 - 2 / math.pi),
        ({"name": "efsignsgd", "feedback": "none"}, 1 - 2 / math.pi),
    ],
    ids=str,
)
def test_of_a_gaussian(settings, expected):
    assert relative_error(make(CompressorSettings(**settings))) == pytest.approx(expected, abs=2e-3)


def test_rounding_loses_its_unit_roundoff_squared():
    """Uniform within half a spacing, which is 2^-p to 2^-(p-1) of the value: between u^2/12 and u^2/3 with u = 2^-p."""
    for name, unit in (("fp16", 2**-11), ("bf16", 2**-8)):
        assert unit**2 / 12 < relative_error(make(CompressorSettings(name=name))) < unit**2 / 3, name


def test_more_bits_lose_less():
    errors = [relative_error(make(CompressorSettings(name="quantize", bits=bits))) for bits in range(2, 9)]
    assert errors == sorted(errors, reverse=True) and errors[0] < 1 and errors[-1] > 0

"""What codecs are said to lose, against what they lose of a Gaussian on paper."""

import math

import pytest
from scipy.integrate import quad
from scipy.stats import norm

from espresso_ds.compressors.registry import make
from espresso_ds.core.config import CompressorSettings
from espresso_ds.profiler.relative_error import relative_error


def beyond(density: float) -> float:
    """Share of a standard normal's squared norm that its largest magnitudes, a share `density` of all, do not hold."""
    threshold = norm.isf(density / 2)
    return 1 - 2 * (threshold * norm.pdf(threshold) + norm.sf(threshold))


def between_powers() -> float:
    """Rounding at random to one of two neighbours a < x < b has the variance (x - a)(b - x): here to powers of two."""
    octaves = ((2.0**e, 2.0 ** (e + 1)) for e in range(-30, 5))
    return sum(quad(lambda x, a=a, b=b: 2 * norm.pdf(x) * (x - a) * (b - x), a, b)[0] for a, b in octaves)


def ternary() -> float:
    """The same between 0 and the largest of 512 magnitudes: s E|x| - E x^2."""
    largest = quad(lambda t: 1 - (1 - 2 * norm.sf(t)) ** 512, 0, 10)[0]
    return largest * math.sqrt(2 / math.pi) - 1


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"name": "identity"}, 0.0),
        ({"name": "topk", "density": 0.01}, beyond(0.01)),
        ({"name": "topk", "density": 0.1}, beyond(0.1)),
        ({"name": "randomk", "density": 0.1}, 0.9),
        ({"name": "efsignsgd"}, 1 - 2 / math.pi),
        ({"name": "efsignsgd", "feedback": "none"}, 1 - 2 / math.pi),
        ({"name": "onebit"}, 1 - 2 / math.pi),
        ({"name": "signsgd"}, 2 - 2 * math.sqrt(2 / math.pi)),
        ({"name": "natural"}, between_powers()),
        ({"name": "qsgd", "bits": 8}, 512 / 127**2 / 6),
    ],
    ids=str,
)
def test_of_a_gaussian(settings, expected):
    assert relative_error(make(CompressorSettings(**settings))) == pytest.approx(expected, abs=2e-3)


def test_of_a_gaussian_in_three_levels():
    assert relative_error(make(CompressorSettings(name="terngrad"))) == pytest.approx(ternary(), abs=2e-2)


def test_rounding_loses_its_unit_roundoff_squared():
    """Uniform within half a spacing, which is 2^-p to 2^-(p-1) of the value: between u^2/12 and u^2/3 with u = 2^-p."""
    formats = [{"name": "fp16"}, {"name": "bf16"}, {"name": "fp8"}, {"name": "fp8", "format": "e5m2"}]
    for settings, unit in zip(formats, (2**-11, 2**-8, 2**-4, 2**-3), strict=True):
        assert unit**2 / 12 < relative_error(make(CompressorSettings(**settings))) < unit**2 / 3, settings


@pytest.mark.parametrize("kind", [{"name": "quantize"}, {"name": "quantize", "range": "absmax"}, {"name": "qsgd"}], ids=str)
def test_more_bits_lose_less(kind):
    errors = [relative_error(make(CompressorSettings(**kind, bits=bits))) for bits in range(2, 9)]
    assert errors == sorted(errors, reverse=True) and errors[-1] > 0
    assert errors[0] < 1 or kind["name"] == "qsgd"

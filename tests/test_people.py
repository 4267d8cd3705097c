"""Figures for people: three digits, in the largest unit of which there is one."""

import pytest

from espresso_ds.core.people import people_bit_per_s, people_bytes, people_seconds


@pytest.mark.parametrize(
    ("words", "given"),
    [
        (
            people_seconds,
            {0.0: "0 us", 85e-6: "85 us", 0.9996e-3: "1 ms", 1.25e-3: "1.25 ms", 0.99999: "1 s", 12345.0: "12345 s"},
        ),
        (people_bytes, {0: "0 B", 256: "256 B", 1023: "1023 B", 4096: "4 KiB", 1023 << 10: "1023 KiB", 3 << 30: "3072 MiB"}),
        (people_bit_per_s, {5.0: "0.005 kbit/s", 950e6: "950 Mbit/s", 999.9e6: "1 Gbit/s", 12.5e9: "12.5 Gbit/s"}),
    ],
)
def test_figures_for_people(words, given):
    assert {value: words(value) for value in given} == given

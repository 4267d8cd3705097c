"""Random numbers by counter: the same everywhere, and random.

Every statistic below has a chance of about 1e-9 to fail for true random numbers. Seeds are fixed, so each holds or does not.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from espresso_ds.compressors import random

N = 1 << 20
CHANCE = 1e-9
SEEDS = (0, 1, 2, 12345, 2**63 - 1)


def mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@pytest.mark.parametrize("seed", SEEDS)
def test_against_unsigned_arithmetic(seed):
    golden, counter = np.uint64(0x9E3779B97F4A7C15), np.arange(1, 501, dtype=np.uint64)
    with np.errstate(over="ignore"):
        outputs = mix(mix(np.array([seed], np.uint64) + golden) + counter * golden)
    words = np.stack([outputs & np.uint64(2**32 - 1), outputs >> np.uint64(32)], 1).astype(np.uint32).reshape(-1)
    assert np.array_equal(random.words(seed, 0, 1000).numpy().view(np.uint32), words)
    assert np.array_equal(random.uniform(seed, 0, 1000).numpy(), (words >> 8).astype(np.float32) / 2**24)


def test_published_output():
    """The first outputs of SplitMix64 from the state 1234567, as in its published test vectors."""
    state = next(s for s in [1234567])
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        outputs = mix(np.uint64(state) + golden * np.arange(1, 4, dtype=np.uint64))
    assert outputs.tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_any_part_is_a_part_of_the_whole():
    whole = random.words(7, 0, 1000)
    for start, numel in ((0, 1), (1, 1), (1, 2), (37, 500), (500, 500), (999, 1), (5, 0)):
        assert torch.equal(random.words(7, start, numel), whole[start : start + numel])
    assert torch.equal(random.words(7, 2**40 + 3, 9)[2:], random.words(7, 2**40 + 5, 7)), "indices beyond 32 bits"
    assert not torch.equal(random.words(7, 2**33, 100), whole[:100])


@pytest.mark.parametrize("seed", SEEDS)
def test_uniform(seed):
    """Kolmogorov-Smirnov on all, chi-square on 4096 cells and on the low byte of words."""
    u = random.uniform(seed, 0, N).double().numpy()
    assert u.min() >= 0 and u.max() < 1
    assert stats.kstest(u, "uniform").pvalue > CHANCE
    assert stats.chisquare(np.bincount((u * 4096).astype(int), minlength=4096)).pvalue > CHANCE
    low = random.words(seed, 0, N).numpy().astype(np.int64) & 255
    assert stats.chisquare(np.bincount(low, minlength=256)).pvalue > CHANCE


@pytest.mark.parametrize("seed", SEEDS)
def test_neighbours_are_independent(seed):
    """Correlations of N pairs are normal with deviation 1 / sqrt(N); 6.4 of these leave a chance of 1e-9 over all lags."""
    u = (random.uniform(seed, 0, N).double().numpy() - 0.5) * np.sqrt(12)
    for lag in (1, 2, 3, 4, 5, 8, 64, 511, 512, 1024, 4096, 65536):
        correlation = (u[lag:] * u[:-lag]).mean()
        assert abs(correlation) < 6.4 / np.sqrt(N - lag), lag
    cells = (random.uniform(seed, 0, N).numpy() * 64).astype(int)
    pairs = np.bincount(cells[::2] * 64 + cells[1::2], minlength=4096)
    assert stats.chisquare(pairs).pvalue > CHANCE


def test_seeds_are_independent():
    """Seeds as they come: neighbours, high bits, and what the executor makes of steps and units."""
    seeds = [0, 1, 2, 3, 2**20, 2**20 + 1, 2**32, 2**33, 2**62, 2**62 + 1]
    u = np.stack([random.uniform(seed, 0, 1 << 17).double().numpy() - 0.5 for seed in seeds]) * np.sqrt(12)
    correlations = u @ u.T / u.shape[1]
    assert np.abs(correlations - np.diag(np.diag(correlations))).max() < 6.8 / np.sqrt(u.shape[1])
    shifted = u[:, 1:] @ u[:, :-1].T / (u.shape[1] - 1)
    assert np.abs(shifted).max() < 6.8 / np.sqrt(u.shape[1] - 1)


def test_every_bit_is_a_fair_coin():
    words = random.words(3, 0, N).numpy().view(np.uint32)
    ones = np.array([((words >> bit) & 1).sum() for bit in range(32)])
    assert (np.abs(ones - N / 2) < 6.4 * np.sqrt(N) / 2).all()
    flips = np.array([(((words[1:] ^ words[:-1]) >> bit) & 1).sum() for bit in range(32)])
    assert (np.abs(flips - N / 2) < 6.4 * np.sqrt(N) / 2).all()

"""Each codec against numpy, and the sizes of payloads."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from codec_cases import CASES, FP32, decoded, encoded, kinds_of_data, normal, sent
from hypothesis import given, settings
from hypothesis import strategies as st

from espresso_ds.compressors import bits, random, topk
from espresso_ds.compressors.randomk import stratified
from espresso_ds.compressors.registry import make
from espresso_ds.core.config import CompressorSettings

BLOCK = 4096


@pytest.mark.parametrize(
    "name, nbytes",
    [
        ("identity", {0: 0, 1: 4, 1000: 4000}),
        ("fp16", {0: 0, 1: 2, 1000: 2000}),
        ("bf16", {0: 0, 1: 2, 1000: 2000}),
        ("fp8", {0: 0, 1: 5, 1024: 1028, 1025: 1033, 2**32: 2**32 + 2**24}),
        ("natural", {0: 0, 1: 1, 1000: 1000}),
        ("fixed_point", {0: 0, 1: 10, 8: 10, 9: 18, 1000: 1002}),
        ("quantize", {0: 0, 1: 12, 8: 12, 9: 16, 4096: 2056, 4097: 2068, 2**32: 8 * 2**20 + 2**31}),
        ("qsgd", {0: 0, 1: 8, 8: 8, 9: 12, 512: 260, 513: 268, 2**32: 4 * 2**23 + 2**31}),
        ("terngrad", {0: 0, 1: 6, 8: 6, 9: 8, 512: 132, 513: 138, 2**32: 4 * 2**23 + 2**30}),
        ("signsgd", {0: 0, 1: 5, 8: 5, 9: 6, 2**32: 4 + 2**29}),
        ("efsignsgd", {0: 0, 1: 5, 8: 5, 9: 6, 4096: 516, 4097: 521, 2**32: 4 * 2**20 + 2**29}),
        ("onebit", {0: 0, 1: 9, 8: 9, 9: 10, 4096: 520, 4097: 529, 2**32: 8 * 2**20 + 2**29}),
        ("topk", {0: 0, 1: 8, 1000: 44, 65536: 4 * 655 + 4, 65537: 4 * 655 + 8, 2**32: 4 * 42949673 + 4 * 65536}),
        ("topk_sampled", {0: 0, 1: 8, 1000: 44, 65537: 4 * 655 + 8}),
        ("dgc", {0: 0, 1: 8, 1000: 8, 65537: 4 * 66 + 8}),
        ("randomk", {0: 0, 1: 4, 1000: 40, 2**32: 4 * 42949673}),
    ],
)
def test_payload_sizes(name, nbytes):
    codec = make(CompressorSettings(name=name))
    assert {numel: codec.payload_nbytes(numel) for numel in nbytes} == nbytes


# ---- floating point


@pytest.mark.parametrize("name, dtype", [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_casts_round_and_saturate(name, dtype):
    codec, x = CASES[name], normal(1000)
    assert torch.equal(decoded(codec, encoded(codec, x), 1000), x.to(dtype).float())
    edge = torch.tensor([FP32.max, -FP32.max, 1.0, 1e-30])
    largest = torch.finfo(dtype).max
    assert decoded(codec, encoded(codec, edge), 4).tolist() == [largest, -largest, 1.0, torch.tensor(1e-30).to(dtype).item()]
    shown = decoded(codec, encoded(codec, torch.tensor([math.inf, -math.inf, math.nan, 1.0])), 4)
    assert shown.isfinite().tolist() == [False, False, False, True]


@pytest.mark.parametrize("format, exponents, mantissa, bias, largest", [("e4m3", 4, 3, 7, 448.0), ("e5m2", 5, 2, 15, 57344.0)])
def test_fp8_takes_the_nearest_value_of_the_format(format, exponents, mantissa, bias, largest):
    """All values of the format built from its definition; the nearest one to every element over the scale of its block."""
    values = sorted(
        {
            (fraction / 2**mantissa + (exponent > 0)) * 2.0 ** (max(exponent, 1) - bias)
            for exponent in range(2**exponents)
            for fraction in range(2**mantissa)
        }
    )
    values = np.array([value for value in values if value <= largest])
    x = normal(3000) * torch.logspace(-4, 2, 3000)
    codec = CASES[f"fp8-{format}"]
    payload = encoded(codec, x)
    got = decoded(codec, payload, 3000).double().numpy()
    scales = payload[:12].view(torch.float32).double().numpy().repeat(1024)[:3000]
    assert np.allclose(
        scales, [np.abs(x.double().numpy()[i // 1024 * 1024 :][:1024]).max() / largest for i in range(3000)], rtol=1e-6
    )
    scaled = np.abs(x.double().numpy()) / scales
    place = np.clip(np.searchsorted(values, scaled), 1, len(values) - 1)
    low, high = values[place - 1], values[place]
    nearest = np.where(scaled - low < high - scaled, low, high) * np.sign(x.double().numpy())
    clear = np.abs((scaled - low) - (high - scaled)) > 1e-5 * high  # elsewhere fp32 may see a tie
    assert clear.mean() > 0.99 and np.allclose(got[clear], (nearest * scales)[clear], rtol=1e-6, atol=0)
    blocks = [got[start : start + 1024] for start in range(0, 3000, 1024)]
    assert np.allclose([np.abs(block).max() for block in blocks], [scales[i * 1024] * largest for i in range(3)], rtol=1e-6)


def test_natural_compression_rounds_to_the_neighbouring_powers():
    """By its definition, with the random numbers of the same seed: up where they are below the mantissa's share."""
    x = torch.cat([normal(5000) * torch.logspace(-12, 12, 5000), torch.tensor([1.0, -2.0, 0.0, -0.0, 2.0**63, 2.0**-62])])
    p = x.double().numpy()
    share = (random.words(3, 0, len(x)).numpy().astype(np.int64) & (2**23 - 1)) / 2.0**23
    with np.errstate(divide="ignore"):
        low = 2.0 ** np.floor(np.log2(np.abs(p)))
    expected = np.sign(p) * np.where((np.abs(p) / np.maximum(low, 1e-300) - 1) + share >= 1, 2 * low, low)
    got = decoded(CASES["natural"], encoded(CASES["natural"], x, seed=3), len(x), seed=3).double().numpy()
    assert np.array_equal(got, expected) and (got[-6:] == p[-6:]).all(), "powers of two are exact"
    beyond = torch.tensor([2.0**64, -FP32.max, 2.0**-64, -1e-40])
    assert decoded(CASES["natural"], encoded(CASES["natural"], beyond), 4).tolist() == [2.0**63, -(2.0**63), 0.0, 0.0]


# ---- quantizers


@pytest.mark.parametrize("span", ("minmax", "absmax"))
@pytest.mark.parametrize("width", range(1, 9))
def test_quantize_against_numpy(width, span):
    x = normal(2 * BLOCK + 333) * 0.01
    x[100:200] = 0
    codec = make(CompressorSettings(name="quantize", bits=width, range=span, feedback="none"))
    out = decoded(codec, encoded(codec, x), len(x))
    for start in range(0, len(x), BLOCK):
        block = x[start : start + BLOCK].double().numpy()
        if span == "minmax":
            low, high = min(block.min(), 0), max(block.max(), 0)
            step = (high - low) / (2**width - 1)
            grid = (np.arange(2**width) - np.rint(-low / step)) * step
        else:
            middle = 2 ** (width - 1) - 1 if width > 1 else 0.5
            step = np.abs(block).max() / max(middle, 1)
            grid = np.arange(-middle, middle + 1) * step
        nearest = grid[np.abs(block[:, None] - grid).argmin(1)]
        got = out[start : start + BLOCK].double().numpy()
        near_tie = np.abs(np.abs(block / step - grid[0] / step) % 1 - 0.5) < 1e-3
        assert np.allclose(got[~near_tie], nearest[~near_tie], rtol=1e-5, atol=1e-9)
        assert (np.abs(got - block) <= step / 2 * (1 + 1e-4) + 1e-12).all()
    assert width == 1 or (out[100:200] == 0).all(), "zero stays exactly zero"


def stochastic(x: np.ndarray, norm: float, levels: int, draws: np.ndarray) -> np.ndarray:
    """Equation (1) of QSGD and of TernGrad: level + 1 with the probability of what is above level, else level."""
    exact = np.abs(x) / norm * levels
    low = np.floor(exact)
    # floor(x + draw) goes up by high draws: away from zero above it, towards zero below it.
    up = np.where(x >= 0, draws >= 1 - (exact - low), draws < exact - low)
    return np.sign(x) * norm / levels * (low + up)


@pytest.mark.parametrize("name", ("qsgd-2", "qsgd-3", "qsgd-4", "qsgd-5", "qsgd-8", "terngrad"))
def test_stochastic_quantizers_against_numpy(name):
    codec, x = CASES[name], normal(3 * 512 + 77) * 0.01
    x[100:200] = 0
    draws = random.uniform(9, 0, len(x)).double().numpy()
    got = decoded(codec, encoded(codec, x, seed=9), len(x), seed=9).double().numpy()
    for start in range(0, len(x), 512):
        block = x[start : start + 512].double().numpy()
        norm = np.linalg.norm(block) if codec.name == "qsgd" else np.abs(block).max()
        expected = stochastic(block, norm, codec.levels, draws[start : start + 512])
        wrong = ~np.isclose(got[start : start + 512], expected, rtol=1e-5, atol=1e-12)
        assert wrong.mean() < 0.01, "more than what fp32 rounds to the other side of a draw"
    assert (got[100:200] == 0).all(), "zero stays exactly zero"


@pytest.mark.parametrize(("shape", "columns"), [((6, 40), 40), ((3, 5, 40), 40), ((6, 4, 5, 2), 40), ((7,), 1), ((0, 40), 40)])
@pytest.mark.parametrize("width", (2, 4, 8))
def test_fixed_point_has_a_scale_for_each_feature_of_a_batch(width, shape, columns):
    """Against numpy; 0.1 is no fp16 number, 1e-9 is below all of them, 1e6 is above."""
    codec = make(CompressorSettings(name="fixed_point", bits=width, feedback="none")).for_shape(shape)
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    rows = x.reshape(-1, columns)
    if columns > 1 and len(rows):
        rows[:, 0], rows[:, 1], rows[0, 2] = np.sign(rows[:, 0]) * np.float32(0.1), rows[:, 1] * 1e-9, 1e6
    flat = torch.from_numpy(x.ravel())
    assert codec.payload_nbytes(flat.numel()) == (2 * columns + -(-flat.numel() // 8) * width if flat.numel() else 0)
    found = decoded(codec, encoded(codec, flat), flat.numel()).numpy().reshape(-1, columns)
    top = 2 ** (width - 1) - 1
    scale = np.abs(rows).max(0, initial=0)
    half = np.minimum(scale, 65504).astype(np.float16)
    above = np.nextafter(np.minimum(half, np.float16(65472)), np.float16(np.inf))
    half = np.where((half.astype(np.float32) < scale) & (half < 65504), above, half)
    step = half.astype(np.float32) / np.float32(top)
    with np.errstate(divide="ignore", invalid="ignore"):
        levels = np.where(step > 0, np.clip(np.rint(rows / step), -top, top), 0)
    np.testing.assert_allclose(found, levels * step, rtol=1e-6, atol=0)


def test_qsgd_contracts_from_six_bits_up():
    assert [make(CompressorSettings(name="qsgd", bits=width)).contractive for width in range(2, 9)] == [False] * 4 + [True] * 3


# ---- signs


@pytest.mark.parametrize("numel", (1, 7, 8, 1003, 70_001))
def test_signs_against_packbits(numel):
    x = normal(numel)
    packed = np.packbits(x.numpy() < 0, bitorder="little")
    means = np.array([np.abs(block).mean() for block in np.split(x.double().numpy(), range(BLOCK, numel, BLOCK))])
    scales = means.repeat(BLOCK)[:numel]
    payload = encoded(CASES["efsignsgd"], x)
    assert np.array_equal(payload.numpy()[4 * len(means) :], packed)
    expected = np.where(x.numpy() < 0, -scales, scales)
    np.testing.assert_allclose(decoded(CASES["efsignsgd"], payload, numel).numpy(), expected, rtol=1e-6)
    for vote in ("mean", "majority"):
        payload = encoded(CASES[f"signsgd-{vote}"], x)
        assert np.array_equal(payload.numpy()[4:], packed) and payload[:4].view(torch.float32).item() == 1
        assert np.array_equal(decoded(CASES[f"signsgd-{vote}"], payload, numel).numpy(), np.where(x.numpy() < 0, -1.0, 1.0))


def test_votes_of_ranks():
    parts = torch.tensor([[1.0, -2.0, 0.1, -0.0], [3.0, -1e-30, -5.0, 0.0], [-2.0, -1.0, -0.2, 7.0], [-1.0, -1.0, 0.3, 7.0]])
    for vote, expected in (("mean", [0.0, -4.0, 0.0, 2.0]), ("majority", [0.0, -4.0, 0.0, 4.0])):
        codec = CASES[f"signsgd-{vote}"]
        rows, out = torch.zeros(4, 16, dtype=torch.uint8), torch.full((4,), math.nan)
        for row, part in zip(rows, parts, strict=True):
            codec.encode(part, row[: codec.payload_nbytes(4)], 0)
        codec.decode_sum(rows, out, 0)
        assert out.tolist() == expected
        codec.decode_sum(rows[:3], out, 0)
        assert out.tolist() == ([1.0, -3.0, -1.0, 1.0] if vote == "mean" else [3.0, -3.0, -3.0, 3.0]), "no tie among three"


def test_onebit_decodes_to_the_means_of_both_signs():
    x = torch.tensor([-1.0, -3.0, 0.5, 1.5, 1.0])
    torch.testing.assert_close(
        decoded(CASES["onebit"], encoded(CASES["onebit"], x), 5), torch.tensor([-2.0, -2.0, 1.0, 1.0, 1.0])
    )


# ---- sparsifiers


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 30_000), st.floats(1e-4, 1), st.sampled_from(["normal", "mostly zero", "many ties", "zeros", "equal"]))
def test_topk_sends_what_a_full_sort_finds(numel, density, kind):
    x, codec = kinds_of_data(numel)[kind], make(CompressorSettings(name="topk", density=density))
    out = decoded(codec, encoded(codec, x), numel).numpy()
    chosen = np.lexsort((np.arange(numel), -np.abs(x.numpy())))[: sent(codec, numel)]
    expected = np.zeros(numel, np.float32)
    expected[chosen] = x[chosen].bfloat16().float().numpy()
    assert np.array_equal(out, expected)


def test_topk_indices_beyond_int32():
    index = torch.tensor([0, 65535, 65536, 2**31 - 1, 2**31, 2**31 + 40_000, 2**32 + 4])
    counts, places = torch.empty(65537, dtype=torch.int32), torch.empty(len(index), dtype=torch.int16)
    topk.split_index(index, counts, places)
    assert torch.equal(topk.join_index(counts, places), index)
    assert counts.sum() == len(index) and counts[0] == 2


@pytest.mark.parametrize("numel, k", [(1, 1), (10, 10), (10, 3), (1000, 999), (70_001, 700), (2**33, 1000), (2**40, 7)])
def test_randomk_draws_one_of_each_stratum(numel, k):
    index = stratified(numel, k, seed=5)
    edges = [j * numel // k for j in range(k + 1)]
    assert all(low <= i < high for i, low, high in zip(index.tolist(), edges[:-1], edges[1:], strict=True))
    assert torch.equal(index, stratified(numel, k, seed=5))
    if numel > k:
        assert any(not torch.equal(index, stratified(numel, k, seed)) for seed in range(6, 12))


def test_randomk_draws_every_element_alike():
    """Each element's count is binomial; 6 of its standard deviations are passed by chance once in 10^7 such tests."""
    counts = torch.zeros(103)
    for seed in range(4000):
        counts[stratified(103, 10, seed)] += 1
    edges = torch.tensor([j * 103 // 10 for j in range(11)])
    expected = (4000 / edges.diff()).repeat_interleave(edges.diff())
    assert ((counts - expected).abs() < 6 * expected.sqrt()).all()


def test_randomk_sends_what_it_draws():
    x, codec = normal(1003), CASES["randomk-0.3"]
    out = decoded(codec, encoded(codec, x, seed=4), 1003, seed=4)
    index = stratified(1003, 301, seed=4)
    assert torch.equal(out[index], x[index]) and out.count_nonzero() == 301


# ---- packing


@pytest.mark.parametrize("width", (1, 2, 4, 8))
@pytest.mark.parametrize("numel", (1, 7, 8, 1001))
def test_packing_is_little_endian_bits(width, numel):
    levels = torch.randint(0, 2**width, (numel,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    out = torch.empty(bits.packed_nbytes(numel, width), dtype=torch.uint8)
    bits.pack(levels, width, out)
    as_bits = np.unpackbits(levels.numpy()[:, None], axis=1, bitorder="little")[:, :width].reshape(-1)
    expected = np.packbits(as_bits, bitorder="little")
    assert np.array_equal(out.numpy()[: len(expected)], expected) and not out[len(expected) :].any()
    assert torch.equal(bits.unpack(out, width, numel), levels)

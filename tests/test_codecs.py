"""One conformance suite over the whole codec registry, then what is particular to each codec, against numpy."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from espresso_ds.compressors import bits, topk
from espresso_ds.compressors.base import padded
from espresso_ds.compressors.quantize import BLOCK
from espresso_ds.compressors.randomk import stratified
from espresso_ds.compressors.registry import CODECS, PARAMETERS, make
from espresso_ds.core.config import CompressorSettings
from espresso_ds.core.errors import FileError

VALUES = {"density": (0.001, 0.01, 0.3, 1.0), "bits": tuple(range(1, 9))}
CASES = [
    CompressorSettings(name=name, **({parameter: value} if parameter else {}))
    for name, entry in CODECS.items()
    for parameter in (entry.defaults or {None: None})
    for value in VALUES.get(parameter, (None,))
]
NAMES = [f"{case.name}-{case.density or case.bits or ''}" for case in CASES]
SIZES = (1, 2, 3, 7, 8, 9, 999, BLOCK - 1, BLOCK, BLOCK + 1, 65535, 65536, 65537, 3 * 65536 + BLOCK + 5)
FP32 = torch.finfo(torch.float32)

codecs = pytest.mark.parametrize("codec", list(map(make, CASES)), ids=NAMES)


def normal(numel: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def new_payload(codec, numel):
    return torch.full((codec.payload_nbytes(numel),), 0xA5, dtype=torch.uint8)


def encoded(codec, x, seed=1):
    payload = new_payload(codec, x.numel())
    codec.encode(x, payload, seed)
    return payload


def decoded(codec, payload, numel, seed=1):
    out = torch.zeros(numel)
    codec.decode_add(payload, out, seed)
    return out


def kinds_of_data(numel: int) -> dict[str, torch.Tensor]:
    x = normal(numel)
    rows = x.clone()
    rows[: numel - numel // 20] = 0
    spike = torch.zeros(numel)
    spike[numel // 2] = -3.0
    return {
        "normal": x,
        "zeros": torch.zeros(numel),
        "equal": torch.full((numel,), -0.37),
        "mostly zero": rows,
        "one spike": spike,
        "subnormal": x * 1e-40,
        "huge": x.clamp(-1, 1) * FP32.max,
        "one sign": x.abs(),
        "many ties": x.round(),
        "wide": x * torch.logspace(-30, 30, numel),
    }


@codecs
@pytest.mark.parametrize("numel", SIZES)
def test_error_is_what_decoding_lacks_and_x_is_kept(codec, numel):
    x = normal(numel)
    kept = x.clone()
    payload, error = new_payload(codec, numel), torch.full((numel,), math.nan)
    codec.encode(x, payload, 1, error)
    assert torch.equal(x, kept)
    assert torch.equal(error, x - decoded(codec, payload, numel))
    assert torch.equal(payload, encoded(codec, x)), "the error asked for changes the payload"
    in_place, again = x.clone(), new_payload(codec, numel)
    codec.encode(in_place, again, 1, in_place)
    assert torch.equal(in_place, error) and torch.equal(again, payload)


@codecs
@pytest.mark.parametrize("numel", (1, 9, BLOCK + 3, 70_001))
def test_any_data_stays_finite_and_contracts(codec, numel):
    for kind, x in kinds_of_data(numel).items():
        error = torch.empty(numel)
        payload = new_payload(codec, numel)
        codec.encode(x, payload, 1, error)
        out = decoded(codec, payload, numel)
        assert out.isfinite().all() and error.isfinite().all(), kind
        if codec.contractive:
            size, left = x.double().norm(), error.double().norm()
            assert left <= size * (1 + 1e-6), kind
            if kind == "normal" and codec.name != "randomk":
                assert left < size, kind


@codecs
@pytest.mark.parametrize("numel", (1, 9, BLOCK + 3, 70_001))
@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
def test_not_finite_shows(codec, numel, bad):
    for place in {0, numel // 2, numel - 1}:
        x = normal(numel)
        x[place] = bad
        assert not decoded(codec, encoded(codec, x), numel).isfinite().all()
    assert not decoded(codec, encoded(codec, torch.full((numel,), bad)), numel).isfinite().all()


@codecs
def test_rows_of_a_padded_buffer(codec):
    numel, rows = 1001, 3
    stride = padded(codec.payload_nbytes(numel))
    buffer = torch.full((rows * stride,), 0xA5, dtype=torch.uint8)
    parts = [normal(numel, seed) for seed in range(rows)]
    for row, part in enumerate(parts):
        codec.encode(part, buffer[row * stride :][: codec.payload_nbytes(numel)], 1)
    for row, part in enumerate(parts):
        assert torch.equal(buffer[row * stride :][: codec.payload_nbytes(numel)], encoded(codec, part))
        assert (buffer[row * stride + codec.payload_nbytes(numel) : (row + 1) * stride] == 0xA5).all(), "wrote beyond its row"


@codecs
def test_decode_adds(codec):
    x, start = normal(BLOCK + 77), normal(BLOCK + 77, seed=5)
    payload, out = encoded(codec, x), start.clone()
    codec.decode_add(payload, out, 1)
    assert torch.equal(out, start + decoded(codec, payload, x.numel()))


@pytest.mark.parametrize("codec", [codec for codec in map(make, CASES) if codec.sum_dtype], ids=str)
def test_summed_payloads_decode_to_the_sum(codec):
    parts = [normal(70_001, seed) for seed in range(3)]
    payloads = [encoded(codec, part) for part in parts]
    total = torch.stack([payload.view(codec.sum_dtype) for payload in payloads]).sum(0, dtype=codec.sum_dtype)
    expected = sum(decoded(codec, payload, 70_001).double() for payload in payloads)
    tolerance = 8 * torch.finfo(codec.sum_dtype).eps
    torch.testing.assert_close(decoded(codec, total.view(torch.uint8), 70_001).double(), expected, rtol=tolerance, atol=tolerance)


@codecs
@pytest.mark.parametrize("numel", (1, 9, BLOCK + 3, 3 * 65536 + BLOCK + 5))
def test_the_branch_of_other_devices_agrees(codec, numel, monkeypatch):
    """The torch branch, run on CPU memory: the same bytes, but for the scale of signs, which is summed in another order."""
    for x in kinds_of_data(numel).values():
        payload = encoded(codec, x)
        out = decoded(codec, payload, numel)
        with monkeypatch.context() as patch:
            patch.setattr(bits, "on_cpu", lambda x: False)
            other, error = new_payload(codec, numel), torch.empty(numel)
            codec.encode(x, other, 1, error)
            assert torch.equal(decoded(codec, payload, numel), out)
            assert torch.equal(error, x - decoded(codec, other, numel))
        if codec.name == "efsignsgd":
            torch.testing.assert_close(other[:4].view(torch.float32), payload[:4].view(torch.float32), rtol=1e-5, atol=1e-44)
            payload[:4] = other[:4]
        assert torch.equal(other, payload)


@codecs
def test_threads_write_the_same_bytes(codec):
    parts = [normal(70_001 + seed, seed) for seed in range(4)]
    alone = [encoded(codec, part) for part in parts]
    sums = [decoded(codec, payload, len(part)) for payload, part in zip(alone, parts, strict=True)]

    def work(i):
        payload = encoded(codec, parts[i])
        return torch.equal(payload, alone[i]) and torch.equal(decoded(codec, payload, len(parts[i])), sums[i])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, [0, 1, 2, 3] * 3))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(range(len(CASES))),
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=60),
)
def test_any_finite_list(case, values):
    codec, x = make(CASES[case]), torch.tensor(values, dtype=torch.float32)
    payload, error = new_payload(codec, len(values)), torch.empty(len(values))
    codec.encode(x, payload, 7, error)
    assert torch.equal(error, x - decoded(codec, payload, len(values), 7)) and error.isfinite().all()
    assert error.double().norm() <= x.double().norm() * (1 + 1e-6)


@pytest.mark.parametrize(
    "name, nbytes",
    [
        ("identity", {1: 4, 1000: 4000}),
        ("fp16", {1: 2, 1000: 2000}),
        ("bf16", {1: 2, 1000: 2000}),
        ("topk", {1: 8, 1000: 44, 65536: 4 * 655 + 4, 65537: 4 * 655 + 8, 2**32: 4 * 42949673 + 4 * 65536}),
        ("randomk", {1: 4, 1000: 40, 2**32: 4 * 42949673}),
        ("efsignsgd", {1: 5, 8: 5, 9: 6, 2**32: 4 + 2**29}),
        ("quantize", {1: 12, 8: 12, 9: 16, 4096: 2056, 4097: 2068, 2**32: 8 * 2**20 + 2**31}),
    ],
)
def test_payload_sizes(name, nbytes):
    codec = make(CompressorSettings(name=name))
    assert {numel: codec.payload_nbytes(numel) for numel in nbytes} == nbytes


# ---- each codec against numpy


def brute_topk(x: np.ndarray, k: int) -> np.ndarray:
    return np.sort(np.lexsort((np.arange(len(x)), -np.abs(x)))[:k])


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 30_000), st.floats(1e-4, 1), st.sampled_from(["normal", "mostly zero", "many ties", "zeros", "equal", "wide"])
)
def test_topk_selects_like_a_full_sort(numel, density, kind):
    x = kinds_of_data(numel)[kind]
    k = topk.kept(density, numel)
    expected = brute_topk(x.numpy(), k)
    assert np.array_equal(topk.largest(x, k).numpy(), expected)
    assert np.array_equal(topk._largest_torch(x, k).numpy(), expected), "the other devices' path"


def test_topk_of_a_large_embedding_gradient():
    """Two rows in a hundred are not zero; more are to be kept than are not zero; a sample that misleads."""
    x = torch.zeros(1500, 1024)
    x[::50] = normal(30 * 1024).view(30, 1024)
    for k in (15_000, 40_000):
        assert np.array_equal(topk.largest(x.view(-1), k).numpy(), brute_topk(x.view(-1).numpy(), k))
    x = normal(1 << 20) * 1e-3
    x[:: (1 << 20) // 65536] = 1.0  # exactly the sampled places
    assert np.array_equal(topk.largest(x, 100_000).numpy(), brute_topk(x.numpy(), 100_000))


def test_topk_puts_nan_above_inf():
    x = torch.tensor([1.0, -math.inf, 5.0, math.nan, 2.0])
    assert topk.largest(x, 2).tolist() == [1, 3] and topk.largest(x, 1).tolist() == [3]


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
    counts = torch.zeros(103)
    for seed in range(4000):
        counts[stratified(103, 10, seed)] += 1
    edges = torch.tensor([j * 103 // 10 for j in range(11)])
    expected = (4000 / edges.diff()).repeat_interleave(edges.diff())
    assert ((counts - expected).abs() < 6 * expected.sqrt()).all()


@pytest.mark.parametrize("numel", (1, 7, 8, 1003, 70_001))
def test_sign_against_packbits(numel):
    x = normal(numel)
    payload = encoded(make(CompressorSettings(name="efsignsgd")), x).numpy()
    assert np.array_equal(payload[4:], np.packbits(x.numpy() < 0, bitorder="little"))
    scale = payload[:4].view(np.float32)[0]
    assert scale == pytest.approx(np.abs(x.numpy().astype(np.float64)).mean(), rel=1e-5)
    expected = np.where(x.numpy() < 0, -scale, scale)
    assert np.array_equal(decoded(make(CompressorSettings(name="efsignsgd")), torch.from_numpy(payload), numel).numpy(), expected)


@pytest.mark.parametrize("name, dtype", [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_casts_round_and_saturate(name, dtype):
    codec, x = make(CompressorSettings(name=name)), normal(1000)
    assert torch.equal(decoded(codec, encoded(codec, x), 1000), x.to(dtype).float())
    edge = torch.tensor([FP32.max, -FP32.max, math.inf, 1.0])
    largest = torch.finfo(dtype).max
    assert decoded(codec, encoded(codec, edge), 4).tolist() == [largest, -largest, math.inf, 1.0]


@pytest.mark.parametrize("width", range(2, 9))
def test_quantize_against_numpy(width):
    x = normal(2 * BLOCK + 333) * 0.01
    x[100:200] = 0
    codec = make(CompressorSettings(name="quantize", bits=width))
    out = decoded(codec, encoded(codec, x), len(x))
    for start in range(0, len(x), BLOCK):
        block = x[start : start + BLOCK].double().numpy()
        low, high = min(block.min(), 0), max(block.max(), 0)
        step = (high - low) / (2**width - 1)
        grid = (np.arange(2**width) - np.rint(-low / step)) * step
        nearest = grid[np.abs(block[:, None] - grid).argmin(1)]
        got = out[start : start + BLOCK].double().numpy()
        near_tie = np.abs(np.abs(block / step) % 1 - 0.5) < 1e-3
        assert np.allclose(got[~near_tie], nearest[~near_tie], rtol=1e-5, atol=1e-9)
        assert (np.abs(got - block) <= np.minimum(step / 2, np.abs(block)) * (1 + 1e-4) + 1e-12).all()
    assert (out[100:200] == 0).all(), "zero stays exactly zero"


def test_one_bit_decodes_to_the_means_of_both_signs():
    x = torch.tensor([-1.0, -3.0, 0.5, 1.5, 1.0])
    codec = make(CompressorSettings(name="quantize", bits=1))
    torch.testing.assert_close(decoded(codec, encoded(codec, x), 5), torch.tensor([-2.0, -2.0, 1.0, 1.0, 1.0]))


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


# ---- the registry


def test_codecs_know_their_names_and_compare_by_value():
    for name in CODECS:
        assert make(CompressorSettings(name=name)).name == name
        assert make(CompressorSettings(name=name)) == make(CompressorSettings(name=name))
    assert make(CompressorSettings(name="topk")) == topk.TopK(0.01)
    assert {parameter for entry in CODECS.values() for parameter in entry.defaults} == set(PARAMETERS)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"name": "topkk"}, "unknown codec 'topkk'; did you mean 'topk'"),
        ({"name": "xyz"}, "known: bf16, efsignsgd"),
        ({"name": "efsignsgd", "density": 0.1}, "efsignsgd has no density (given: 0.1); it takes no parameters"),
        ({"name": "quantize", "density": 0.1}, "it takes bits"),
        ({"name": "topk", "bits": 4}, "it takes density"),
    ],
)
def test_senseless_settings_are_named(given, message):
    with pytest.raises(FileError) as caught:
        make(CompressorSettings(**given))
    assert message in str(caught.value)

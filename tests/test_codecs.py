"""One conformance suite over the whole codec registry with many parameters: what `Codec` promises, and what each file states."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from codec_cases import CASES, FP32, decoded, encoded, error_bound, kinds_of_data, lost_share, new_payload, normal
from hypothesis import given, settings
from hypothesis import strategies as st

from espresso_ds.compressors import backend, spanwise
from espresso_ds.compressors.base import padded

BLOCK = 4096
SIZES = (0, 1, 7, 8, 9, 999, BLOCK - 1, BLOCK, BLOCK + 1, 65535, 65536, 65537, 2**16 + 3, 3 * 65536 + BLOCK + 5)
DRAWING = ("natural", "qsgd", "terngrad", "randomk")
"""Codecs that draw random numbers."""
DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))


def _backends(codec):
    return (False,) if codec.name in ("qsgd", "terngrad", "randomk") else (False, True)


codecs = pytest.mark.parametrize("codec", [pytest.param(codec, id=name) for name, codec in CASES.items()])


@pytest.fixture
def plain(request, monkeypatch):
    """Whether kernels are left out, so that the torch code runs that is their reference."""
    if request.param:
        monkeypatch.setattr(backend, "_kernel", lambda *_: None)


codecs_with_and_without_kernels = pytest.mark.parametrize(
    "codec, plain",
    [pytest.param(codec, plain, id=f"{name}{', plain' * plain}") for name, codec in CASES.items() for plain in _backends(codec)],
    indirect=["plain"],
)


# ---- what was kept


@codecs_with_and_without_kernels
@pytest.mark.parametrize("numel", SIZES)
def test_kept_is_what_decoding_lacks(codec, numel, plain):
    x, residual = normal(numel), normal(numel, seed=2) * 0.1
    before, p = (x.clone(), residual.clone()), x + residual
    payload, kept = new_payload(codec, numel), torch.full((numel,), math.nan)
    codec.encode(x, payload, 1, residual, kept)
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1])
    assert torch.equal(kept, p - decoded(codec, payload, numel))
    assert torch.equal(payload, encoded(codec, p)), "not the payload of x + residual"
    again = new_payload(codec, numel)
    codec.encode(x, again, 1, residual)
    assert torch.equal(again, payload), "asking for what is kept changes the payload"
    codec.encode(x, again, 1, residual, residual)
    assert torch.equal(residual, kept) and torch.equal(again, payload), "kept in the memory of the residual"
    codec.encode(x, again, 1, None, residual)
    assert torch.equal(residual, x - decoded(codec, again, numel)), "kept without a residual"


@codecs_with_and_without_kernels
@pytest.mark.parametrize("numel", (1, 9, BLOCK + 1, 2**16 + 3))
def test_kept_in_bfloat16(codec, numel, plain):
    x, residual = normal(numel), (normal(numel, seed=2) * 0.1).bfloat16()
    payload, kept = new_payload(codec, numel), torch.empty(numel, dtype=torch.bfloat16)
    codec.encode(x, payload, 1, residual, kept)
    p = x + residual.float()
    assert torch.equal(payload, encoded(codec, p))
    assert torch.equal(kept, (p - decoded(codec, payload, numel)).bfloat16())
    codec.encode(x, payload, 1, residual, residual)
    assert torch.equal(residual, kept)


# ---- what was lost


@codecs
@DTYPES
@pytest.mark.parametrize("numel", (1, 9, BLOCK + 3, 70_001))
def test_any_data_stays_finite_within_the_bound(codec, numel, dtype):
    for kind, x in kinds_of_data(numel).items():
        payload, kept = new_payload(codec, numel), torch.empty(numel, dtype=dtype)
        codec.encode(x, payload, 1, None, kept)
        out = decoded(codec, payload, numel)
        assert out.isfinite().all() and kept.isfinite().all(), kind
        p = x.double().numpy()
        lost, bound = np.abs(p - out.double().numpy()), error_bound(codec, p)
        assert (lost <= bound * (1 + 1e-4) + 1e-44).all(), kind
        if codec.contractive:
            assert np.linalg.norm(lost) <= np.linalg.norm(p) * (1 + 1e-6), kind


CONTRACTIVE = [pytest.param(codec, id=name) for name, codec in CASES.items() if codec.contractive]


@pytest.mark.parametrize("codec", CONTRACTIVE)
@pytest.mark.parametrize("numel", (9, BLOCK + 3, 70_001))
def test_contracts_in_the_mean_as_stated(codec, numel):
    for kind in ("normal", "mostly zero", "one spike", "equal", "one sign", "many ties"):
        x = kinds_of_data(numel)[kind]
        if kind == "one spike" and codec.name == "randomk":
            continue  # all or nothing; that every element is drawn alike has a test of its own
        seeds = range(40) if codec.name in DRAWING else (1,)
        lost = [(x - decoded(codec, encoded(codec, x, seed), numel, seed)).double().norm().item() ** 2 for seed in seeds]
        chance = 6 * np.std(lost) / math.sqrt(len(lost))
        whole = x.double().norm().item() ** 2
        assert np.mean(lost) <= lost_share(codec, numel) * whole * (1 + 1e-5) + chance, kind
        assert kind != "normal" or np.mean(lost) < whole


UNBIASED = [pytest.param(codec, id=name) for name, codec in CASES.items() if codec.unbiased]


@pytest.mark.parametrize("codec", UNBIASED)
def test_unbiased(codec):
    """Hoeffding: of draws within `width`, the mean of N is off by width * sqrt(L / 2N) with a chance below 2 exp(-L).

    L = 30 makes that less than 1e-12 for each element, and 1e-9 for all. Beside the single elements, which show gross errors,
    their sum along x, along its signs and altogether is looked at: there errors of one direction add up while chance cancels.
    """
    numel, draws, log_chance = 1000, 600, 30
    for scale in (1.0, 1e-10):
        x = normal(numel) * scale
        x[::7] *= 1e-3
        total = torch.zeros(numel, dtype=torch.float64)
        for seed in range(draws):
            total += decoded(codec, encoded(codec, x, seed), numel, seed)
        p = x.double().numpy()
        bias, width = total.numpy() / draws - p, error_bound(codec, p) * (1 + 1e-5)  # a draw is one of two values so far apart
        tolerance = math.sqrt(log_chance / (2 * draws))
        rounding = 1e-6 * np.abs(p)
        assert (np.abs(bias) <= width * tolerance + rounding).all()
        for along in (p / np.abs(p).max(), np.sign(p), np.ones(numel)):
            spread = np.linalg.norm(width * along)
            assert abs(bias @ along) <= spread * tolerance + np.abs(rounding * along).sum()


# ---- NaN and Inf


@codecs_with_and_without_kernels
@pytest.mark.parametrize("numel", (1, 9, BLOCK + 3, 70_001))
@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
def test_not_finite_shows_and_is_not_kept(codec, numel, bad, plain):
    residual = normal(numel, seed=2)
    for place in {0, numel // 2, numel - 1}:
        x = normal(numel)
        x[place] = bad
        for dtype in (torch.float32, torch.bfloat16):
            payload, kept = new_payload(codec, numel), torch.empty(numel, dtype=dtype)
            codec.encode(x, payload, 1, residual.to(dtype), kept)
            assert not decoded(codec, payload, numel).isfinite().all()
            assert kept.isfinite().all()
    assert not decoded(codec, encoded(codec, torch.full((numel,), bad)), numel).isfinite().all()


@codecs_with_and_without_kernels
@pytest.mark.parametrize("sign", (1, -1))
def test_a_sum_beyond_fp32_counts_as_infinite(codec, sign, plain):
    x, residual, kept = normal(999), normal(999, seed=2), torch.empty(999)
    x[500] = residual[500] = sign * FP32.max
    payload = new_payload(codec, 999)
    codec.encode(x, payload, 1, residual, kept)
    assert not decoded(codec, payload, 999).isfinite().all() and kept.isfinite().all()


@codecs
def test_not_finite_shows_in_a_sum(codec):
    x = normal(999)
    x[500] = math.nan
    rows, out = rows_of(codec, [normal(999, 5), x, normal(999, 6)]), torch.empty(999)
    codec.decode_sum(rows, out, 1)
    assert not out.isfinite().all()


# ---- payloads in buffers


def rows_of(codec, parts):
    """Payloads of equally long parts as rows of a buffer, uint8 of shape (count, stride), 0xA5 where nobody has written."""
    nbytes = codec.payload_nbytes(len(parts[0]))
    rows = torch.full((len(parts), padded(nbytes) + 32), 0xA5, dtype=torch.uint8)
    for row, part in zip(rows, parts, strict=True):
        codec.encode(part, row[:nbytes], 1)
    return rows


@codecs_with_and_without_kernels
def test_rows_of_a_padded_buffer(codec, plain):
    parts = [normal(1001, seed) for seed in range(3)]
    nbytes, rows = codec.payload_nbytes(1001), rows_of(codec, parts)
    for row, part in zip(rows, parts, strict=True):
        assert torch.equal(row[:nbytes], encoded(codec, part))
    assert (rows[:, nbytes:] == 0xA5).all(), "wrote beyond its row"


@codecs_with_and_without_kernels
@pytest.mark.parametrize("numel", SIZES)
def test_the_sum_of_rows_is_the_sum_of_the_rows(codec, numel, plain):
    """Bit for bit what adding one after the other to +0.0 gives; of a majority, its sign as often as there are rows."""
    for count in (1, 3, 4) if numel < 10_000 else (3,):
        rows = rows_of(codec, [normal(numel, seed) for seed in range(count)])
        out, expected = torch.full((numel,), math.nan), torch.zeros(numel)
        codec.decode_sum(rows, out, 1)
        for row in rows:
            codec.decode_add(row[: codec.payload_nbytes(numel)], expected, 1)
        if codec.votes:
            expected = expected.sign() * count
        assert torch.equal(out, expected)
        assert not (out.view(torch.int32) == -(2**31)).any(), "a sum from +0.0 is never -0.0"


@codecs_with_and_without_kernels
def test_decode_adds(codec, plain):
    x, start = normal(BLOCK + 77), normal(BLOCK + 77, seed=5)
    payload, out = encoded(codec, x), start.clone()
    codec.decode_add(payload, out, 1)
    assert torch.equal(out, start + decoded(codec, payload, x.numel()))


@codecs
@pytest.mark.parametrize("numel", (1, 9, BLOCK + 3, 65537))
@pytest.mark.parametrize("offset", (1, 2, 4))
def test_any_address(codec, numel, offset):
    """Gradients that are slices, or even begin between two floats, give the same bytes, and nothing beside them is touched."""

    def moved(values):
        memory = bytearray(b"\xa5" * (4 * numel + offset + 8))
        tensor = torch.frombuffer(memory, dtype=torch.float32, count=numel, offset=offset)
        assert tensor.data_ptr() % 4 == offset % 4
        tensor.copy_(values)
        return tensor, memory

    x, residual, start = normal(numel), normal(numel, 2) * 0.1, normal(numel, 3)
    payload, kept = new_payload(codec, numel), torch.empty(numel)
    codec.encode(x, payload, 1, residual, kept)
    out = start.clone()
    codec.decode_add(payload, out, 1)
    (odd_x, memory), (odd_kept, kept_memory), (odd_out, out_memory) = moved(x), moved(residual), moved(start)
    again = new_payload(codec, numel)
    codec.encode(odd_x, again, 1, odd_kept, odd_kept)
    codec.decode_add(again, odd_out, 1)
    assert torch.equal(again, payload) and torch.equal(odd_kept, kept) and torch.equal(odd_out, out)
    for each in (memory, kept_memory, out_memory):
        assert set(each[:offset] + each[4 * numel + offset :]) == {0xA5}


SUMMABLE = [pytest.param(codec, id=name) for name, codec in CASES.items() if codec.sum_dtype]


@pytest.mark.parametrize("codec", SUMMABLE)
def test_summed_payloads_decode_to_the_sum(codec):
    payloads = [encoded(codec, normal(70_001, seed)) for seed in range(3)]
    total = torch.stack([payload.view(codec.sum_dtype) for payload in payloads]).sum(0, dtype=codec.sum_dtype)
    expected = sum(decoded(codec, payload, 70_001).double() for payload in payloads)
    tolerance = 8 * torch.finfo(codec.sum_dtype).eps
    torch.testing.assert_close(decoded(codec, total.view(torch.uint8), 70_001).double(), expected, rtol=tolerance, atol=tolerance)


# ---- who, when and where makes no difference


@codecs
def test_kernels_write_what_plain_torch_writes(codec, monkeypatch):
    """The same bytes, but for means of magnitudes, which may differ in their last bits."""
    for numel in (9, 2 * BLOCK + 3, 65537):
        for kind, x in kinds_of_data(numel).items():
            residual, kept, plainly_kept = x.flip(0), torch.empty(numel), torch.empty(numel)
            payload, plain = new_payload(codec, numel), new_payload(codec, numel)
            codec.encode(x, payload, 1, residual, kept)
            out = decoded(codec, payload, numel)
            with monkeypatch.context() as patch:
                patch.setattr(backend, "_kernel", lambda *_: None)
                codec.encode(x, plain, 1, residual, plainly_kept)
                assert torch.equal(decoded(codec, payload, numel).nan_to_num(7.0), out.nan_to_num(7.0)), kind
                plainly_out = decoded(codec, plain, numel)
            if codec.name in ("efsignsgd", "onebit"):
                torch.testing.assert_close(plainly_out, out, rtol=1e-6, atol=1e-44, equal_nan=True)
            else:
                assert torch.equal(plain, payload), kind
                assert (x + residual).isinf().any() or torch.equal(plainly_kept, kept), kind


SPANWISE = [pytest.param(codec, id=name) for name, codec in CASES.items() if isinstance(codec, spanwise.Spanwise)]


@pytest.mark.parametrize("codec", SPANWISE)
def test_where_spans_end_changes_no_byte(codec, monkeypatch):
    """A GPU takes a tensor at once, a CPU in spans: what one writes the other reads."""
    monkeypatch.setattr(backend, "_kernel", lambda *_: None)
    numel = 2 * spanwise.SPAN + 4099
    x, residual = normal(numel), normal(numel, 2) * 0.1
    results = []
    for span in (spanwise.SPAN, 8 * spanwise.SPAN, BLOCK):
        monkeypatch.setattr(spanwise, "SPAN", span)
        payload, kept, out = new_payload(codec, numel), torch.empty(numel), torch.empty(numel)
        codec.encode(x, payload, 1, residual, kept)
        codec.decode_sum(payload[None], out, 1)
        results.append((payload, kept, out))
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@codecs
def test_threads_write_the_same_bytes(codec):
    parts = [normal(70_001 + seed, seed) for seed in range(4)]
    alone = [encoded(codec, part) for part in parts]
    sums = [decoded(codec, payload, len(part)) for payload, part in zip(alone, parts, strict=True)]

    def work(i):
        payload = encoded(codec, parts[i])
        return torch.equal(payload, alone[i]) and torch.equal(decoded(codec, payload, len(parts[i])), sums[i])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, [0, 1, 2, 3] * 2))


@codecs
def test_the_seed_decides(codec):
    x = normal(BLOCK + 3)
    payloads = [encoded(codec, x, seed) for seed in (1, 1, 2, 2**63 - 1)]
    assert torch.equal(payloads[0], payloads[1])
    draws = codec.name in DRAWING and getattr(codec, "density", 0) != 1
    assert torch.equal(payloads[0], payloads[2]) is not draws and torch.equal(payloads[2], payloads[3]) is not draws
    assert codec.shared_seed is (codec.name == "randomk")


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(CASES)),
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=60),
)
def test_any_finite_list(case, values):
    codec, x = CASES[case], torch.tensor(values, dtype=torch.float32)
    payload, kept = new_payload(codec, len(values)), torch.empty(len(values))
    codec.encode(x, payload, 7, None, kept)
    out = decoded(codec, payload, len(values), 7)
    assert out.isfinite().all() and kept.isfinite().all() and torch.equal(kept, x - out)
    assert not codec.contractive or kept.double().norm() <= x.double().norm() * (1 + 1e-6)

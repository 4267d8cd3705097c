"""The native kernels of sign, onebit and quantize: the bytes of torch and numpy, on every CPU, thread count and address."""

import itertools
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from espresso_ds.compressors import backend, native
from espresso_ds.compressors.base import padded
from espresso_ds.compressors.onebit import OneBit
from espresso_ds.compressors.quantize import Quantize
from espresso_ds.compressors.sign import EFSignSGD
from espresso_ds.core.native import library

pytestmark = pytest.mark.timeout(120)

BLOCK = 4096
SIZES = [0, 1, 7, 8, 9, 63, 65, 4095, 4096, 4097, 65536 + 3]
QUANTIZERS = [Quantize(bits, span) for bits in range(1, 9) for span in ("minmax", "absmax")]
CODECS = [EFSignSGD(), OneBit(), *QUANTIZERS]
GUARD = 0xA5
LARGEST = torch.finfo(torch.float32).max


def name(codec):
    return f"{codec.name}{codec.bits}{codec.range}" if isinstance(codec, Quantize) else codec.name


every_codec = pytest.mark.parametrize("codec", CODECS, ids=name)


@pytest.fixture(autouse=True)
def defaults():
    assert library() is not None, "espresso_ds was built without its native code"
    yield
    native.limit_cpu(2)
    native.use_threads(1, 0)


@pytest.fixture(params=[0, 1, 2], ids=["baseline", "avx2", "avx512"])
def level(request):
    native.limit_cpu(request.param)
    if native.cpu_level() != ("baseline", "AVX2", "AVX-512")[request.param]:
        pytest.skip("this CPU has no such instructions")


@pytest.fixture
def reference(monkeypatch):
    """Runs a function with the codecs' own torch code."""

    def run(function, *args):
        with monkeypatch.context() as patch:
            patch.setattr(backend, "_kernel", lambda name, device: None)
            return function(*args)

    return run


def guarded(numel, dtype, shift=0):
    """A tensor amid guard bytes, `shift` elements off alignment."""
    size = torch.empty(0, dtype=dtype).element_size()
    whole = torch.full((64 + numel * size + 64,), GUARD, dtype=torch.uint8)
    start = 16 - whole.data_ptr() % 16 + shift * size
    part = whole[start : start + numel * size].view(dtype) if not shift else whole.view(dtype)[start // size :][:numel]
    return whole, part, start, start + numel * size


def check_guard(whole, start, stop):
    assert (whole[:start] == GUARD).all() and (whole[stop:] == GUARD).all()


def encode(codec, x, residual=None, dtype=None, alias=False, shift=0):
    """The payload and what is kept; nothing else is written."""
    n = x.numel()
    memory, payload, *bounds = guarded(codec.payload_nbytes(n), torch.uint8)
    given = None if residual is None else residual.to(dtype).clone()
    if alias:
        assert given is not None
        codec.encode(x, payload, 0, given, given)
        check_guard(memory, *bounds)
        return payload, given
    before = None if given is None else given.clone()
    kept_memory, kept, *kept_bounds = guarded(n, dtype or torch.float32, shift)
    codec.encode(x, payload, 0, given, kept)
    check_guard(memory, *bounds)
    check_guard(kept_memory, *kept_bounds)
    assert before is None or torch.equal(before, given)
    return payload, kept.clone()


def decode(codec, payloads, n, shift=0, start=None):
    """decode_sum of rows, or, from `start` on, decode_add of each."""
    nbytes = codec.payload_nbytes(n)
    rows = torch.full((len(payloads), padded(nbytes) + 32), GUARD, dtype=torch.uint8)
    for row, payload in zip(rows, payloads, strict=True):
        row[:nbytes] = payload
    memory, out, *bounds = guarded(n, torch.float32, shift)
    if start is None:
        codec.decode_sum(rows, out, 0)
    else:
        out.copy_(start)
        for row in rows:
            codec.decode_add(row[:nbytes], out, 0)
    check_guard(memory, *bounds)
    return out.clone()


def scales_nbytes(codec, n):
    number = 1 if isinstance(codec, EFSignSGD) or getattr(codec, "range", "") == "absmax" else 2
    return 4 * number * -(-n // BLOCK)


def assert_same(codec, found, expected, n):
    """Equal bytes; means of a block may differ in their last bits, and what is kept by that."""
    head = scales_nbytes(codec, n)
    (payload, kept), (payload_expected, kept_expected) = found, expected
    assert torch.equal(payload[head:], payload_expected[head:])
    if isinstance(codec, Quantize):
        assert torch.equal(payload, payload_expected)
        assert torch.equal(kept, kept_expected)
    else:
        scales, wanted = payload[:head].view(torch.float32), payload_expected[:head].view(torch.float32)
        torch.testing.assert_close(scales, wanted, rtol=1e-6, atol=0, equal_nan=True)
        most = max(wanted[wanted.isfinite()].abs().tolist(), default=0.0)
        if kept.dtype == torch.float32:
            torch.testing.assert_close(kept, kept_expected, rtol=1e-6, atol=2e-6 * most)
        else:
            torch.testing.assert_close(kept.float(), kept_expected.float(), rtol=2**-7, atol=2e-6 * most)


def gradients(n, seed=0):
    """Of all magnitudes, some of them zero, one element off alignment."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n + 1, generator=generator) * 10 ** torch.randint(-3, 3, (n + 1,), generator=generator).float()
    x[torch.rand(n + 1, generator=generator) < 0.1] = 0
    x[torch.rand(n + 1, generator=generator) < 0.05] *= -0.0
    return x[1:]


@every_codec
@pytest.mark.parametrize("n", SIZES)
def test_bytes_of_the_reference(codec, n, level, reference):
    x, residual = gradients(n), gradients(n, seed=1)
    for dtype in (torch.float32, torch.bfloat16):
        for arguments in ((None, dtype, False, 1), (residual, dtype, False, 0), (residual, dtype, True, 0)):
            found = encode(codec, x, *arguments)
            assert_same(codec, found, reference(encode, codec, x, *arguments), n)
    payloads = [reference(encode, codec, gradients(n, seed))[0] for seed in range(3)]
    for shift in (0, 1):
        assert torch.equal(decode(codec, payloads, n, shift), reference(decode, codec, payloads, n))
        start = gradients(n, seed=7)
        assert torch.equal(decode(codec, payloads, n, shift, start), reference(decode, codec, payloads, n, 0, start))


@every_codec
def test_nobody_wants_what_is_kept(codec, level, reference):
    x, residual = gradients(4097), gradients(4097, seed=1)
    payload = torch.zeros(codec.payload_nbytes(4097), dtype=torch.uint8)
    codec.encode(x, payload, 0, residual, None)
    assert torch.equal(payload, encode(codec, x, residual, torch.float32)[0])


@every_codec
@pytest.mark.parametrize("count", [0, 1, 2, 8, 9, 16, 17, 40])
def test_any_number_of_rows(codec, count, level, reference):
    n = 4096 + 517
    payloads = [reference(encode, codec, gradients(n, seed))[0] for seed in range(count)]
    found = decode(codec, payloads, n)
    assert torch.equal(found, reference(decode, codec, payloads, n))
    if count == 0:
        assert torch.equal(found.view(torch.int32), torch.zeros(n, dtype=torch.int32))


SPECIAL = {
    "nan": [float("nan")],
    "negative nan": [float("-nan")],
    "inf": [float("inf")],
    "both infs": [float("inf"), float("-inf")],
    "zeros": [],
    "largest": [LARGEST, -LARGEST],
    "largest above": [LARGEST],
    "subnormal": [1e-42, -3e-45],
    "smallest normal": [1.1754944e-38],
}


@every_codec
@pytest.mark.parametrize("special", SPECIAL)
def test_special_values(codec, special, level, reference):
    n = 3 * BLOCK + 100
    for where, dtype in itertools.product((0, BLOCK + 63, 3 * BLOCK + 99), (torch.float32, torch.bfloat16)):
        x = torch.zeros(n) if special in ("zeros", "subnormal", "smallest normal") else gradients(n)
        for i, value in enumerate(SPECIAL[special]):
            x[where - i] = value
        residual = torch.zeros(n)
        payload, kept = encode(codec, x, residual, dtype, True)
        assert_same(codec, (payload, kept), reference(encode, codec, x, residual, dtype, True), n)
        assert kept.isfinite().all()
        decoded = decode(codec, [payload], n)
        assert decoded.isfinite().all() == x.isfinite().all()
        if special in ("nan", "inf"):
            block = slice(where // BLOCK * BLOCK, where // BLOCK * BLOCK + BLOCK)
            outside = torch.ones(n, dtype=torch.bool)
            outside[block] = False
            assert not decoded[block].isfinite().all() and decoded[outside].isfinite().all()


@every_codec
def test_an_overflowing_residual_shows(codec, level):
    x, residual = torch.full((5000,), 3e38), torch.full((5000,), 3e38)
    payload, kept = encode(codec, x, residual, torch.float32, True)
    assert not decode(codec, [payload], 5000).isfinite().any()
    assert kept.isfinite().all()


@every_codec
def test_blocks_of_largest_values_stay_finite(codec, level, reference):
    x = torch.full((2 * BLOCK,), LARGEST)
    x[::3] *= -1
    for dtype in (torch.float32, torch.bfloat16):
        payload, kept = encode(codec, x, torch.zeros(2 * BLOCK), dtype, True)
        assert kept.isfinite().all() and decode(codec, [payload], 2 * BLOCK).isfinite().all()
        assert_same(codec, (payload, kept), reference(encode, codec, x, torch.zeros(2 * BLOCK), dtype, True), 2 * BLOCK)


@every_codec
def test_levels_of_cpu_agree_to_the_bit(codec):
    n = 5 * BLOCK + 77
    x, residual = gradients(n), gradients(n, seed=1)
    found = []
    for limit in range(3):
        native.limit_cpu(limit)
        payload, kept = encode(codec, x, residual, torch.float32, True)
        found.append((payload, kept, decode(codec, [payload] * 3, n)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@every_codec
def test_threads_change_nothing(codec):
    n = 40 * BLOCK + 3
    x, residual = gradients(n), gradients(n, seed=1)
    found = []
    for threads in (1, 2, 3, 7):
        native.use_threads(threads, 0)
        for _ in range(3):
            payload, kept = encode(codec, x, residual, torch.bfloat16, True)
            found.append((payload, kept, decode(codec, [payload] * 2, n)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_many_callers_at_once():
    native.use_threads(2, 0)
    n = 20 * BLOCK + 9
    jobs = [(codec, gradients(n, seed)) for seed, codec in enumerate(CODECS)]
    expected = [encode(codec, x, x, torch.float32, True) for codec, x in jobs]
    together = threading.Barrier(6)

    def work(_):
        together.wait(timeout=30)
        return [encode(codec, x, x, torch.float32, True) for codec, x in jobs]

    with ThreadPoolExecutor(6) as callers:
        for found in callers.map(work, range(6)):
            for (payload, kept), (payload_expected, kept_expected) in zip(found, expected, strict=True):
                assert torch.equal(payload, payload_expected) and torch.equal(kept, kept_expected)


def test_a_forked_child_works_on():
    native.use_threads(3, 0)
    x, codec = gradients(40 * BLOCK), EFSignSGD()
    payload, _ = encode(codec, x)  # the pool has its threads now
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if torch.equal(encode(codec, x)[0], payload) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(encode(codec, x)[0], payload)


def blocks_of(x):
    return np.split(x, range(BLOCK, len(x), BLOCK))


def test_sign_by_numpy(level):
    x = gradients(3 * BLOCK + 123).numpy()
    payload, kept = encode(EFSignSGD(), torch.from_numpy(x))
    scales = np.array([np.abs(block.astype(np.float64)).mean() for block in blocks_of(x)])
    np.testing.assert_allclose(payload[:16].view(torch.float32).numpy(), scales, rtol=1e-6)
    np.testing.assert_array_equal(payload[16:].numpy(), np.packbits(np.signbit(x), bitorder="little"))
    for block, rest in zip(blocks_of(x.astype(np.float64)), blocks_of(kept.double().numpy()), strict=True):
        bound = (block**2).sum() - np.abs(block).sum() ** 2 / len(block)  # Karimireddy et al., the error of the scaled sign
        np.testing.assert_allclose((rest**2).sum(), bound, rtol=1e-5)


def test_onebit_by_numpy(level):
    x = gradients(3 * BLOCK + 123).numpy()
    payload, kept = encode(OneBit(), torch.from_numpy(x))
    exact = [
        (block[np.signbit(block)].astype(np.float64).mean(), block[~np.signbit(block)].mean(dtype=np.float64))
        for block in blocks_of(x)
    ]
    np.testing.assert_allclose(payload[:32].view(torch.float32).numpy().reshape(2, 4), np.transpose(exact), rtol=1e-6)
    np.testing.assert_array_equal(payload[32:].numpy(), np.packbits(np.signbit(x), bitorder="little"))
    for block, rest, means in zip(blocks_of(x.astype(np.float64)), blocks_of(kept.double().numpy()), exact, strict=True):
        lower = np.signbit(block).sum()
        error = (block**2).sum() - lower * means[0] ** 2 - (len(block) - lower) * means[1] ** 2
        np.testing.assert_allclose((rest**2).sum(), error, rtol=1e-5)


def fields(packed, n, bits):
    """Levels from their planes, by numpy."""
    levels, at, shift = np.zeros(n, np.int64), 0, 0
    for width in (8, 4, 2, 1):
        if bits & width:
            nbytes = -(-n // 8) * width
            each = np.unpackbits(packed[at : at + nbytes], bitorder="little").reshape(-1, width)[:n]
            levels += (each.astype(np.int64) << np.arange(width)).sum(1) << shift
            at, shift = at + nbytes, shift + width
    assert at == len(packed)
    return levels


@pytest.mark.parametrize("codec", QUANTIZERS, ids=name)
def test_quantize_by_numpy(codec, level):
    n = 2 * BLOCK + 123
    x = gradients(n).numpy()
    payload, kept = encode(codec, torch.from_numpy(x))
    head = scales_nbytes(codec, n)
    symmetric, bits = codec.range == "absmax", codec.bits
    middle = 0.5 if bits == 1 else 2 ** (bits - 1) - 1
    top = 2 * middle if symmetric else 2**bits - 1
    steps = payload[:12].view(torch.float32).numpy()
    zeros = np.full(3, np.float32(middle)) if symmetric else payload[12:24].view(torch.float32).numpy()
    levels = fields(payload[head:].numpy(), n, bits)
    decoded = decode(codec, [payload], n).numpy()
    for b, block in enumerate(blocks_of(x.astype(np.float64))):
        span = slice(b * BLOCK, b * BLOCK + len(block))
        lo, hi = min(block.min(), 0), max(block.max(), 0)
        step = np.abs(block).max() / max(1, middle) if symmetric else (hi - lo) / top
        np.testing.assert_allclose(steps[b], step, rtol=1e-6)
        if not symmetric:
            assert abs(zeros[b] + lo / step) <= 0.5 + 1e-4 and zeros[b] == round(zeros[b]) and 0 <= zeros[b] <= top
        assert 0 <= levels[span].min() and levels[span].max() <= top
        values = (levels[span] - zeros[b].astype(np.float64)) * steps[b]
        np.testing.assert_allclose(decoded[span], values, rtol=1e-6)
        error = np.abs(block - values)
        np.testing.assert_allclose(np.abs(kept.double().numpy()[span]), error, atol=1e-6 * np.abs(block).max())
        if codec.contractive:
            assert (error <= np.minimum(np.abs(block), step / 2) + 2e-6 * np.abs(block).max()).all()
        else:
            assert (error <= step / 2 + 1e-6 * step).all()
    assert codec.contractive == (not (symmetric and bits == 1))


def test_zero_gradients_of_sparse_rows_stay_zero(level):
    x = gradients(2 * BLOCK)
    x[100:3000] = 0
    for codec in QUANTIZERS:
        if codec.contractive:
            assert (decode(codec, [encode(codec, x)[0]], len(x))[100:3000] == 0).all()


def test_a_bfloat16_residual_is_rounded_to_nearest_even(level):
    x = gradients(BLOCK)
    exact, rounded = (encode(Quantize(3), x, torch.zeros(BLOCK), dtype, True)[1] for dtype in (torch.float32, torch.bfloat16))
    assert torch.equal(exact.to(torch.bfloat16), rounded)

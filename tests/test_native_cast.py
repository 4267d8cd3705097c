"""Casts, SignSGD, fp8 and natural compression: kernels against the plain torch code, both against casts of torch and numpy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from codec_cases import kinds_of_data, new_payload, normal

from espresso_ds.compressors import backend, native_cast, random
from espresso_ds.compressors.base import padded
from espresso_ds.compressors.cast import Bf16, Fp16
from espresso_ds.compressors.fp8 import Fp8
from espresso_ds.compressors.natural import Natural
from espresso_ds.compressors.signsgd import SignSGD
from espresso_ds.core.native import library

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(library() is None, reason="built without native code"),
]

FP32, BF16 = torch.float32, torch.bfloat16
SIZES = (0, 1, 7, 8, 63, 64, 65, 1023, 1025, 4096, 4097, 3 * 65536 + 4099)
CODECS = {
    "fp16": Fp16(),
    "bf16": Bf16(),
    "mean": SignSGD("mean"),
    "majority": SignSGD("majority"),
    "e4m3": Fp8("e4m3"),
    "e5m2": Fp8("e5m2"),
    "natural": Natural(),
}
CASTS = {"fp16": (torch.float16, np.float16), "bf16": (torch.bfloat16, None)}
codecs = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
casts = pytest.mark.parametrize("name", CASTS)
LEVELS, THREADS = (0, 1, 2), (1, 2, 3)
SEED = 2**63 - 12345


@pytest.fixture(autouse=True)
def all_of_the_machine_again():
    yield
    library().espresso_cpu_limit(2)
    library().espresso_threads(1, 0)


@pytest.fixture
def plainly(monkeypatch):
    """Calls a function without kernels."""

    def call(function, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(backend, "_kernel", lambda *_: None)
            return function(*arguments)

    return call


def directly(function, *arguments):
    return function(*arguments)


def machines():
    for level, threads in itertools.cycle(itertools.product(LEVELS, THREADS)):
        library().espresso_cpu_limit(level)
        library().espresso_threads(threads, 0)
        yield level, threads


def every_level():
    for level in LEVELS:
        library().espresso_cpu_limit(level)
        yield level


def not_finite(numel: int) -> torch.Tensor:
    """Here and there, NaN of several patterns among it."""
    x = normal(numel) * 1e4
    some = torch.tensor([0x7FC00000, 0x7F800001, -1, 0x7F812345, 0x7F800000, -0x800000], dtype=torch.int32).view(FP32)
    at = torch.arange(0, numel, max(1, numel // 9))
    x[at] = some[torch.arange(len(at)) % len(some)]
    return x


def data_of(numel: int) -> dict[str, torch.Tensor]:
    if numel == 0:
        return {"nothing": torch.empty(0)}
    pattern = torch.randint(-(2**31), 2**31, (numel,), generator=torch.Generator().manual_seed(3), dtype=torch.int64)
    return {
        **kinds_of_data(numel),
        "not finite": not_finite(numel),
        "all NaN": torch.full((numel,), math.nan),
        "any bits": pattern.int().view(FP32),
        "around the largest": (1 + normal(numel) * 2**-10) * 65504,
    }


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def rows_of(codec, parts, dirt=0xA5):
    nbytes = codec.payload_nbytes(len(parts[0]))
    rows = torch.full((len(parts), padded(nbytes) + 32), dirt, dtype=torch.uint8)
    for row, part in zip(rows, parts, strict=True):
        codec.encode(part, row[:nbytes], SEED)
    return rows


# ---- what a kernel does and what it stands for


@pytest.mark.parametrize("name", ("cast", "signsgd", "fp8", "natural"))
def test_kernels_are_found(name):
    """Else what follows would compare plain torch with itself."""
    for verb in ("encode", "decode_sum"):
        assert backend.kernel(f"{name}_{verb}", torch.empty(0)) is getattr(native_cast, f"{name}_{verb}")


@codecs
@pytest.mark.parametrize("numel", SIZES)
def test_encoding_is_the_references(codec, numel, plainly):
    machine = machines()
    memories = [(None, "none"), (FP32, "alone"), (BF16, "alone"), *itertools.product((FP32, BF16), ("same", "other", "none"))]
    memory = normal(numel, 1) * 0.3
    if numel > 100_000:
        memories = [memories[i] for i in (0, 3, 7)]
    for (kind, x), (dtype, place) in itertools.product(data_of(numel).items(), memories):
        results, before = [], x.clone()
        for reference in (True, False):
            used, payload = None if reference else next(machine), new_payload(codec, numel)
            residual = None if dtype is None or place == "alone" else memory.to(dtype, copy=True)
            kept = {"same": residual, "none": None}.get(place, torch.full((numel,), 7.0, dtype=dtype or FP32))
            call = plainly if reference else directly
            call(codec.encode, x, payload, SEED, residual, kept)
            results.append((payload, kept))
        case = kind, dtype, place, used
        assert same_bits(x, before), case
        assert torch.equal(results[0][0], results[1][0]), case
        if results[0][1] is not None:
            assert results[1][1].isfinite().all(), case
            if codec.name != "signsgd" or not np.isnan(results[0][0][:4].numpy().view(np.float32)).any():
                assert same_bits(results[0][1], results[1][1]), case


@codecs
@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("count", (1, 2, 16, 37))
def test_decoding_is_the_references(codec, numel, count, plainly):
    """More rows than are added up at once, too; NaN and Inf in some."""
    machine, parts = machines(), [normal(numel, seed) * 3.0**seed for seed in range(count)]
    if count == 16 and numel:
        parts[3] = not_finite(numel)
    rows = rows_of(codec, parts)
    outs = [torch.full((numel,), math.nan) for _ in range(2)]
    plainly(codec.decode_sum, rows, outs[0], SEED)
    used = next(machine)
    codec.decode_sum(rows, outs[1], SEED)
    assert torch.equal(outs[0].nan_to_num(-77.0), outs[1].nan_to_num(-77.0)), used
    finite = outs[0].isfinite()
    assert same_bits(outs[0][finite], outs[1][finite]), used
    for row in rows[:5]:
        sums = [normal(numel, 9), normal(numel, 9)]
        plainly(codec.decode_add, row[: codec.payload_nbytes(numel)], sums[0], SEED)
        used = next(machine)
        codec.decode_add(row[: codec.payload_nbytes(numel)], sums[1], SEED)
        assert torch.equal(sums[0].nan_to_num(-77.0), sums[1].nan_to_num(-77.0)), used


@codecs
@pytest.mark.parametrize("numel", (17, 4099))
@pytest.mark.parametrize("dtype", (FP32, BF16), ids=("fp32", "bf16"))
def test_any_address_and_nothing_beside_it(codec, numel, dtype):
    def moved(values, offset):
        memory = bytearray(b"\xa5" * (values.numel() * values.element_size() + 16))
        tensor = torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=offset)
        tensor.copy_(values)
        return tensor, lambda: set(memory[:offset] + memory[offset + values.numel() * values.element_size() :]) == {0xA5}

    x, residual, start = normal(numel), (normal(numel, 2) * 0.1).to(dtype), normal(numel, 3)
    payload, kept, out = new_payload(codec, numel), residual.clone(), start.clone()
    codec.encode(x, payload, SEED, kept, kept)
    codec.decode_add(payload, out, SEED)
    for level, offset in itertools.product(every_level(), (1, 2, 4)):
        arrays = [moved(values, offset) for values in (x, residual, start, payload)]
        (odd_x, _), (odd_kept, _), (odd_out, _), (odd_payload, _) = arrays
        codec.encode(odd_x, odd_payload, SEED, odd_kept, odd_kept)
        codec.decode_add(odd_payload, odd_out, SEED)
        assert same_bits(odd_payload, payload) and same_bits(odd_kept, kept) and same_bits(odd_out, out), (level, offset)
        assert all(untouched() for _, untouched in arrays), (level, offset)


# ---- casts, by what others say


@casts
def test_every_value_round_trips(name):
    """All 2**16 codes: decoded as torch does; encoded again they are what they were, but Inf and NaN, which become one NaN."""
    dtype, of_numpy = CASTS[name]
    codes = torch.arange(-(2**15), 2**15).to(torch.int16)
    values = codes.view(dtype).float()
    finite = values.isfinite()
    for level in every_level():
        out = torch.empty(2**16)
        CODECS[name].decode_sum(codes.view(torch.uint8)[None], out, 0)
        assert torch.equal(out[finite], values[finite]) and not (out == 0).logical_and(out.signbit()).any(), level
        assert torch.equal(out.isnan(), values.isnan()) and torch.equal(out.isinf(), values.isinf()), level
        again, kept = new_payload(CODECS[name], 2**16), torch.full((2**16,), math.nan)
        CODECS[name].encode(values, again, 0, None, kept)
        again = again.view(torch.int16)
        assert torch.equal(again[finite], codes[finite]), level
        assert set(again[~finite].tolist()) == {0x7E00 if name == "fp16" else 0x7FC0}, level
        assert torch.equal(kept, torch.zeros(2**16)), level
        if of_numpy:
            assert np.array_equal(out.numpy()[finite], codes.numpy().view(of_numpy)[finite].astype(np.float32)), level


@casts
def test_between_two_values(name):
    """Just below, at and just above the middle of all neighbours, and of those middles the even one is taken."""
    dtype, of_numpy = CASTS[name]
    largest = torch.finfo(dtype).max
    codes = torch.arange(0, torch.tensor(largest, dtype=dtype).view(torch.int16).item()).to(torch.int16)
    lower, upper = codes.view(dtype).double(), (codes + 1).view(dtype).double()
    middle = ((lower + upper) / 2).float()
    exact = middle.double() == (lower + upper) / 2
    assert exact.all() or name == "bf16"  # the smallest subnormals of fp32 have no middle
    pattern = middle.view(torch.int32)
    for sign, (step, expected) in itertools.product((1, -1), ((-1, codes), (0, codes + (codes & 1)), (1, codes + 1))):
        x = (pattern + step).view(FP32) * sign
        payload, kept = new_payload(CODECS[name], len(x)), torch.empty(len(x))
        for level in every_level():
            CODECS[name].encode(x, payload, 0, None, kept)
            sent = payload.view(dtype)
            assert torch.equal(sent.float().abs(), expected.to(torch.int16).view(dtype).float()), (level, step)
            assert same_bits(sent, x.to(dtype)), (level, step)
            assert torch.equal(kept, x - sent.float()), (level, step)
            if of_numpy:
                assert np.array_equal(sent.view(torch.int16).numpy(), x.numpy().astype(of_numpy).view(np.int16))


@casts
def test_the_end_of_the_range(name):
    """Finite values become the largest, whatever they are; sums beyond fp32 are infinite, and so NaN."""
    dtype = CASTS[name][0]
    largest, top = torch.finfo(dtype).max, torch.finfo(FP32).max
    x = torch.tensor([largest, largest * (1 + 2**-12), largest * 1.0001, top, (largest + top) / 2, top, math.inf, math.nan] * 9)
    x = x.where(x.abs() <= top, x.sign() * math.inf)
    residual = torch.tensor([0, 0, 0, 0, 0, top, 0, 0] * 9)
    for sign, level in itertools.product((1, -1), every_level()):
        payload, kept = new_payload(CODECS[name], 72), torch.empty(72)
        CODECS[name].encode(x * sign, payload, 0, residual * sign, kept)
        sent = payload.view(dtype).float().view(9, 8)
        p = (x + residual).view(9, 8)
        assert torch.equal(sent[:, :5][p[:, :5].isfinite()], torch.full((9, 5), sign * largest)[p[:, :5].isfinite()]), level
        assert sent[:, 5:].isnan().all(), level
        assert torch.equal(kept.view(9, 8), torch.where(p.isfinite(), (p - largest) * sign, 0.0)), level


def test_payloads_summed_to_infinity_show():
    total = torch.tensor([65504.0] * 70).half() * 2
    for level in every_level():
        out = torch.zeros(70)
        Fp16().decode_add(total.view(torch.uint8), out, 0)
        assert out.isinf().all(), level


# ---- the others, by what others say


@pytest.mark.parametrize("format, dtype", [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_every_fp8_value_round_trips(format, dtype):
    codec, codes = CODECS[format], torch.arange(256, dtype=torch.uint8)
    values = codes.view(dtype).float()
    payload = torch.cat([torch.tensor([1.0]).view(torch.uint8), codes])
    finite = values.isfinite()
    x = torch.where(finite, values, 0.0)
    for level in every_level():
        out, again = torch.zeros(256), new_payload(codec, 256)
        codec.decode_add(payload, out, 0)
        assert torch.equal(out[finite], values[finite]) and not out[~finite].isfinite().any(), level
        codec.encode(x, again, 0)
        assert torch.equal(again[4:][finite], codes[finite]) and torch.equal(again[:4], payload[:4]), level


@pytest.mark.parametrize("format, dtype", [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_fp8_rounds_as_torch(format, dtype):
    """With a scale of 1, over all of the range, subnormals and what is less among it."""
    top = torch.finfo(dtype).max
    x = normal(1023, 4) * torch.logspace(-12, 0, 1023) * 40
    x = torch.cat([x.clamp(-top, top), torch.tensor([top])])
    codes = x.to(dtype).view(torch.uint8)
    for level in every_level():
        payload = new_payload(CODECS[format], 1024)
        CODECS[format].encode(x, payload, 0)
        assert torch.equal(payload[4:], codes), level


@pytest.mark.parametrize("seed", (0, 1, SEED))
def test_natural_draws_the_documented_words(seed):
    """In whole numbers of Python: 2**e m becomes 2**(e + 1) where the lowest 23 bits of its word carry."""
    numel, mask = 5000, 2**64 - 1

    def mix(z):
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        return z ^ z >> 31

    golden, x = 0x9E3779B97F4A7C15, normal(numel, 5)
    outputs = [mix(mix(seed + golden & mask) + (j + 1) * golden & mask) for j in range(numel // 2)]
    drawn = np.array([half for z in outputs for half in (z & 0xFFFFFFFF, z >> 32)], np.uint32)
    assert np.array_equal(drawn.view(np.int32), random.words(seed, 0, numel).numpy())
    mantissa, exponent = np.frexp(np.abs(x.numpy()).astype(np.float64))
    carries = (2 * mantissa - 1) * 2**23 + (drawn & 0x7FFFFF) >= 2**23
    expected = np.copysign(2.0 ** (exponent - 1 + carries), x.numpy()).astype(np.float32)
    for level in every_level():
        payload, out = new_payload(CODECS["natural"], numel), torch.zeros(numel)
        CODECS["natural"].encode(x, payload, seed)
        CODECS["natural"].decode_add(payload, out, seed)
        assert np.array_equal(out.numpy(), expected), level


def test_natural_codes_are_the_documented():
    codes = torch.arange(256, dtype=torch.uint8)
    powers = [0.0, *(2.0**e for e in range(-62, 64)), math.nan]
    for level in every_level():
        out = torch.zeros(256)
        CODECS["natural"].decode_add(codes, out, 0)
        np.testing.assert_array_equal(out.numpy(), np.array(powers + [-p for p in powers], np.float32), str(level))


@pytest.mark.parametrize("count", (1, 3, 4, 17, 40))
def test_votes_are_counted(count):
    """By numpy; -0.0 is a vote against."""
    numel = 4096 + 77
    parts = [normal(numel, seed).round() * (-1) ** seed for seed in range(count)]
    votes = np.where(np.signbit(np.stack([part.numpy() for part in parts])), -1, 1).sum(0)
    for level, vote in itertools.product(every_level(), ("mean", "majority")):
        codec, out = CODECS[vote], torch.full((numel,), math.nan)
        codec.decode_sum(rows_of(codec, parts), out, 0)
        assert np.array_equal(out.numpy(), votes if vote == "mean" else count * np.sign(votes)), (level, vote)
        assert not out.signbit()[out == 0].any(), (level, vote)

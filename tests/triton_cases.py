"""The Triton kernels in Triton's interpreter, called by the codecs and compared with their torch code; `test_triton.py` runs this
file in a process of its own, because TRITON_INTERPRET must be set before triton is imported."""

from __future__ import annotations

import os
from itertools import permutations

import pytest
import torch
from codec_cases import FP32, decoded, kinds_of_data, new_payload, normal

from espresso_ds.compressors import backend, triton_kernels
from espresso_ds.compressors.base import padded
from espresso_ds.compressors.onebit import OneBit
from espresso_ds.compressors.quantize import Quantize
from espresso_ds.compressors.sign import EFSignSGD
from espresso_ds.compressors.threshold import positions, sampling
from espresso_ds.compressors.topk import TopK, kept
from espresso_ds.compressors.topk_sampled import TopKSampled

CODECS = {
    "efsignsgd": EFSignSGD(),
    "onebit": OneBit(),
    **{f"minmax{bits}": Quantize(bits) for bits in (8, 5, 4, 2, 1)},
    **{f"absmax{bits}": Quantize(bits, "absmax") for bits in (8, 7, 4, 2, 1)},
    "topk": TopK(0.01),
    "topk 30%": TopK(0.3),
    "all": TopK(1.0),
    "sampled": TopKSampled(0.01),
    "sampled 30%": TopKSampled(0.3),
}
SIZES = (1, 7, 8, 9, 4095, 4096, 4097)
KINDS = tuple(kinds_of_data(8))
BAD = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf, "overflow": FP32.max}

every_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)


def test_interpreter_is_on():
    assert os.environ["TRITON_INTERPRET"] == "1"


def test_backend_offers_every_kernel_and_no_other():
    for name in triton_kernels.__all__:
        assert backend.kernel(name, torch.empty(0, device="meta")) is None
        assert backend._kernel(name, "cuda") is getattr(triton_kernels, name)
    assert backend._kernel("no_such_kernel", "cuda") is None


@pytest.fixture
def either(monkeypatch):
    """Call a function with the torch code of the codecs, or with the kernels."""
    used = set()

    def kernel(name, device):
        used.add(name)
        return getattr(triton_kernels, name)

    def call(triton, function, *args):
        monkeypatch.setattr(backend, "_kernel", kernel if triton else lambda name, device: None)
        return function(*args)

    yield call
    assert used and used <= set(triton_kernels.__all__)


def at_odd_addresses(*tensors):
    """Copies that start one element after an aligned address."""
    return [torch.cat([t.new_zeros(1), t])[1:] for t in tensors]


def encode(codec, x, residual, in_place):
    """The payload and what is kept, the residual's dtype or float32."""
    payload, kept = new_payload(codec, x.numel()), torch.full_like(x if residual is None else residual, 7.0)
    if residual is not None:
        (residual,) = at_odd_addresses(residual)
        kept = residual if in_place else kept
    codec.encode(x, payload, 1, residual, kept)
    return payload, kept


def assert_encodes_alike(either, codec, x, residual=None, in_place=False):
    (x,) = at_odd_addresses(x)
    before = x.clone()
    expected, expected_kept = either(False, encode, codec, x, residual, in_place)
    payload, kept = either(True, encode, codec, x, residual, in_place)
    assert torch.equal(payload, expected)
    assert torch.equal(kept.view(torch.uint8), expected_kept.view(torch.uint8))
    assert torch.equal(x, before)
    return payload


def assert_decodes_alike(either, codec, payloads, numel):
    (out,) = at_odd_addresses(normal(numel, 3))
    rows = torch.full((len(payloads), padded(codec.payload_nbytes(numel)) + 32), 0xA5, dtype=torch.uint8)
    for row, payload in zip(rows, payloads, strict=True):
        row[: len(payload)] = payload
    for function, *args in ((codec.decode_sum, rows), (codec.decode_sum, rows[:0]), (codec.decode_add, payloads[0])):
        expected, summed = out.clone(), out.clone()
        either(False, function, *args, expected, 1)
        either(True, function, *args, summed, 1)
        assert torch.equal(summed.view(torch.int32), expected.view(torch.int32))


@every_codec
@pytest.mark.parametrize("numel", SIZES)
def test_sizes(either, codec, numel):
    """Without residual, and with one of either dtype, apart and in place; then the sum of the three payloads."""
    x = normal(numel)
    payloads = [
        assert_encodes_alike(either, codec, x),
        assert_encodes_alike(either, codec, x, normal(numel, 1)),
        assert_encodes_alike(either, codec, -x, normal(numel, 2).bfloat16(), in_place=True),
    ]
    assert_decodes_alike(either, codec, payloads, numel)


@pytest.mark.parametrize("name", ("efsignsgd", "onebit", "minmax4", "absmax8", "topk", "sampled"))
def test_more_than_one_block_of_places(either, name):
    numel = (1 << 16) + 3
    payload = assert_encodes_alike(either, CODECS[name], normal(numel), normal(numel, 1), in_place=True)
    assert_decodes_alike(either, CODECS[name], [payload], numel)


@pytest.mark.parametrize("name", ("efsignsgd", "onebit", "minmax8", "minmax1", "absmax4", "absmax1", "topk", "sampled 30%"))
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_data(either, name, kind):
    x = kinds_of_data(4100)[kind]
    assert_decodes_alike(either, CODECS[name], [assert_encodes_alike(either, CODECS[name], x, 0.01 * x.bfloat16())], x.numel())


@every_codec
def test_nothing_to_do(monkeypatch, codec):
    monkeypatch.setattr(backend, "_kernel", lambda name, device: getattr(triton_kernels, name))
    nothing = torch.empty(0)
    payload, _ = encode(codec, nothing, nothing.clone(), True)
    assert payload.numel() == 0
    codec.decode_sum(payload.view(3, 0), nothing, 1)
    codec.decode_add(payload, nothing, 1)


@every_codec
@pytest.mark.parametrize("bad", BAD)
def test_not_finite_shows(either, codec, bad):
    """Where the reference gives something that is not finite, and nowhere else; what is kept is finite."""
    x, residual = normal(4100), normal(4100, 1).bfloat16()
    x[[5, 4099]] = BAD[bad]
    residual[[5, 4099]] = torch.finfo(torch.bfloat16).max
    expected, _ = either(False, encode, codec, x, residual, True)
    payload, kept = either(True, encode, codec, x, residual, True)
    assert kept.isfinite().all()
    shown, wanted = (either(False, decoded, codec, each, 4100) for each in (payload, expected))
    finite = wanted.isfinite()
    assert not finite.all()
    assert torch.equal(shown.isfinite(), finite)
    assert torch.equal(shown[finite], wanted[finite])


@pytest.mark.parametrize("name", ("topk", "topk 30%", "sampled", "sampled 30%"))
@pytest.mark.parametrize("share", (0.1, 10.0))
def test_sample_that_misleads(either, name, share):
    """All that is sampled is small, so that more is listed than wanted, or large, so that too little reaches the guess."""
    codec, numel = CODECS[name], 20_000
    size, _ = sampling(numel, kept(codec.density, numel), codec.exact)
    x = normal(numel).sign() + normal(numel, 1) / 100
    x[positions(numel, size)] *= share
    assert_encodes_alike(either, codec, x)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("density", (0.01, 0.3))
@pytest.mark.parametrize("numel", (1, 9, 4097, 20_000))
def test_momentum(either, dtype, density, numel):
    codec, x = TopKSampled(density), normal(numel)
    u, v = normal(numel, 1).to(dtype), normal(numel, 2).to(dtype)

    def encode_momentum(velocity, velocity_kept, residual, kept):
        payload = new_payload(codec, numel)
        codec.encode_momentum(x, velocity, velocity_kept, residual, kept, payload, 1, 0.9, 0.37)
        return payload

    results = []
    for triton in (False, True):
        (velocity, residual), (u_kept, v_kept) = at_odd_addresses(u, v), (torch.empty_like(u), torch.empty_like(v))
        results.append(
            [
                either(triton, encode_momentum, u, u_kept, v, v_kept),
                either(triton, encode_momentum, u, None, None, None),
                either(triton, encode_momentum, velocity, velocity, residual, residual),
                *(kept.float() for kept in (u_kept, v_kept, velocity, residual)),
            ]
        )
    for expected, got in zip(*results, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name", ("efsignsgd", "absmax1", "topk"))
def test_sum_is_in_row_order(either, name):
    """As 1e8, 1 and -1e8 show."""
    codec, numel = CODECS[name], 4097
    payloads = [either(False, encode, codec, torch.full((numel,), value), None, False)[0] for value in (1e8, 1.0, -1e8)]
    for order in permutations(payloads):
        assert_decodes_alike(either, codec, order, numel)


def test_counts_that_are_no_payload_write_nothing_outside(either):
    codec, numel = CODECS["topk"], 70_000
    payload = torch.full((codec.payload_nbytes(numel),), 0xFF, dtype=torch.uint8)
    for first in (0x7F, 0xFF):
        payload[3] = first
        memory = torch.zeros(numel + 131_072)
        either(True, codec.decode_add, payload, memory[65_536:-65_536], 1)
        assert not memory[:65_536].any() and not memory[-65_536:].any()

"""The sparse codecs and their kernels: native code against the plain torch code, that against numpy, DGC against its paper."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from espresso_ds.compressors import native_topk, threshold, topk
from espresso_ds.compressors.dgc import DGC
from espresso_ds.compressors.topk import TopK, kept
from espresso_ds.compressors.topk_sampled import TopKSampled
from espresso_ds.core.errors import MismatchError
from espresso_ds.core.native import library

pytestmark = pytest.mark.timeout(120)
needs_native = pytest.mark.skipif(library() is None, reason="built without native code")

SIZES = (1, 7, 65535, 65536, 65537, 2**16 + 3, 200_000)
DENSITIES = (0.001, 0.01, 0.3, 1.0)
FP32, BF16 = torch.float32, torch.bfloat16
LEVELS, THREADS = (0, 1, 2), (1, 2, 3)
HUGE = 3.4e38  # finite, but not in bfloat16


@pytest.fixture(autouse=True)
def all_of_the_machine_again():
    yield
    if (native := library()) is not None:
        native.espresso_cpu_limit(2)
        native.espresso_threads(1, 0)


def normal(numel: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def not_finite(numel: int) -> torch.Tensor:
    x = normal(numel)
    x[numel // 2], x[numel // 3], x[-1] = math.nan, -math.inf, HUGE
    return x


def in_the_sample(numel: int, *, large: bool) -> torch.Tensor:
    """Large exactly where the sample looks, or everywhere else."""
    x = normal(numel)
    size, _ = threshold.sampling(numel, kept(0.01, numel), False)
    x[threshold.positions(numel, size)] *= 1000 if large else 0
    return x


DATA = {
    "normal": normal,
    "zeros": torch.zeros,
    "equal": lambda n: torch.full((n,), -0.37),
    "ties": lambda n: normal(n).round(),
    "mostly zero": lambda n: torch.where(torch.arange(n) // 768 % 50 == 3, normal(n), 0.0),
    "one spike": lambda n: torch.where(torch.arange(n) == n // 2, -3.0, 0.0),
    "subnormal": lambda n: normal(n) * 1e-40,
    "rising": lambda n: torch.arange(n).float(),
    "sample sees all": lambda n: in_the_sample(n, large=True),
    "sample sees none": lambda n: in_the_sample(n, large=False),
    "not finite": not_finite,
    "all NaN": lambda n: torch.full((n,), math.nan),
}


def brute_force(p: np.ndarray, k: int) -> np.ndarray:
    """Ascending indices of the k largest magnitudes, by a full stable sort of their bits."""
    magnitudes = p.view(np.uint32) & 0x7FFFFFFF
    return np.sort(np.lexsort((np.arange(len(p)), -magnitudes.astype(np.int64)))[:k])


def brute_reaching(p: np.ndarray, k: int) -> np.ndarray:
    """The same of those that reach the sampled threshold, written anew from its description."""
    size, rank = threshold.sampling(len(p), k, False)
    run = 16 if len(p) > 512 else len(p)
    runs, units = size // run, len(p) // run
    mixed = [j * 2654435769 % 2**32 for j in range(runs)]
    hashed = [(j ^ j >> 16) * 2246822519 % 2**32 for j in mixed]
    first = [(j * ((units << 16) // runs) >> 16) + (hashed[j] * (units // runs) >> 32) for j in range(runs)]
    at = [run * unit + i for unit in first for i in range(run)]
    magnitudes = (p.view(np.uint32) & 0x7FFFFFFF).astype(np.int64)
    guess = 1 if rank > size else min(max(np.sort(magnitudes[at])[-rank], 1), 0x7F800000)
    return brute_force(p, min(k, np.count_nonzero(magnitudes >= guess)))


def payload_of(numel: int, k: int) -> torch.Tensor:
    return torch.full((4 * k + 4 * -(-numel // 65536),), 0xA5, dtype=torch.uint8)


def index_of(payload: torch.Tensor, numel: int, k: int) -> np.ndarray:
    counts, places = payload[: 4 * -(-numel // 65536)].view(torch.int32), payload[-2 * k :].view(torch.int16)
    return topk.join_index(counts, places).numpy()


def same_bits(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def copies(memory: torch.Tensor | None, place: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """A memory and where it is kept: "same" array, an"other", or "none"."""
    old = None if memory is None else memory.clone()
    return old, {"same": old, "other": None if old is None else torch.full_like(old, 7.0), "none": None}[place]


def settings_of_the_machine():
    for level, threads in itertools.cycle(itertools.product(LEVELS, THREADS)):
        library().espresso_cpu_limit(level)
        library().espresso_threads(threads, 0)
        yield level, threads


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("numel", SIZES)
def test_the_reference_selects_what_a_full_sort_does(numel, kind):
    p = DATA[kind](numel)
    for density in DENSITIES:
        k = kept(density, numel)
        assert np.array_equal(topk.largest(p, k).numpy(), brute_force(p.numpy(), k))
        assert np.array_equal(threshold.reaching(p, k).numpy(), brute_reaching(p.numpy(), k))


@needs_native
@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("numel", SIZES)
def test_native_encoding_is_the_references(numel, kind):
    x, machine = DATA[kind](numel), settings_of_the_machine()
    memories = [(None, "none"), *itertools.product((FP32, BF16), ("same", "other", "none"))]
    densities = DENSITIES if numel < 100_000 else (0.01,)
    for density, exact, (dtype, place) in itertools.product(densities, (True, False), memories):
        k, memory = kept(density, numel), None if dtype is None else (normal(numel, 1) * 0.3).to(dtype)
        results = []
        for encode in (topk.topk_encode, native_topk.topk_encode):
            used, payload = next(machine) if results else None, payload_of(numel, k)
            residual, left = copies(memory, place)
            given = x.clone()
            encode(given, residual, left, payload, k, exact)
            assert same_bits(given, x)
            results.append((payload, left))
        case = density, exact, dtype, place, used
        assert torch.equal(results[0][0], results[1][0]), case
        if results[1][1] is not None:
            assert results[1][1].isfinite().all(), case
            if x.isfinite().all():
                assert same_bits(results[0][1], results[1][1]), case


@needs_native
@pytest.mark.parametrize("kind", ("normal", "mostly zero", "ties", "not finite"))
@pytest.mark.parametrize("numel", (1, 7, 65537, 200_000))
def test_native_momentum_is_the_references(numel, kind):
    x, machine = DATA[kind](numel), settings_of_the_machine()
    places = ("same", "other", "none")
    memories = [(None, "none"), *itertools.product((FP32, BF16), places)]
    for i, (fast, (dtype, place)) in enumerate(itertools.product(itertools.product((FP32, BF16), places), memories)):
        density = (0.01, 0.3)[i % 2]
        k, memory = kept(density, numel), None if dtype is None else normal(numel, 1).to(dtype)
        results = []
        for encode in (topk.dgc_encode, native_topk.dgc_encode):
            used, payload = next(machine) if results else None, payload_of(numel, k)
            residual, left = copies(memory, place)
            velocity, velocity_left = copies(normal(numel, 2).to(fast[0]), fast[1])
            encode(x.clone(), velocity, velocity_left, residual, left, payload, k, 0.9, 0.7)
            results.append((payload, left, velocity_left))
        case = density, fast, dtype, place, used
        assert torch.equal(results[0][0], results[1][0]), case
        for one, other in zip(results[0][1:], results[1][1:], strict=True):
            assert other is None or other.isfinite().all(), case
            assert same_bits(one, other), case


@needs_native
@pytest.mark.parametrize("numel", (17, 65539, 200_000))
def test_any_address(numel):
    """One byte off, as slices of a communication buffer may be."""
    k = kept(0.01, numel)
    x, residual = normal(numel), normal(numel, 1)
    aligned, off = payload_of(numel, k), payload_of(numel, k)
    left = residual.clone()
    topk.topk_encode(x, residual, left, aligned, k, True)
    arrays = []
    for array in (x, residual):
        room = torch.zeros(4 * numel + 1, dtype=torch.uint8)
        room[1:] = array.view(torch.uint8)
        arrays.append(torch.frombuffer(room.numpy(), dtype=FP32, offset=1, count=numel))
    for machine, _ in zip(settings_of_the_machine(), range(9), strict=False):
        arrays[1].copy_(residual)
        native_topk.topk_encode(arrays[0], arrays[1], arrays[1], off, k, True)
        assert torch.equal(off, aligned) and torch.equal(arrays[1], left), machine


@needs_native
def test_many_more_than_k_reach_the_guess():
    """Lists are cut to their k largest on the way, in every piece, and once more in the end."""
    numel, machine = 700_001, settings_of_the_machine()
    for kind in ("sample sees none", "rising", "equal", "all NaN"):
        x = DATA[kind](numel)
        for exact in (True, False):
            k, results = kept(0.01, numel), []
            for encode in (topk.topk_encode, native_topk.topk_encode):
                used, payload, left = next(machine), payload_of(numel, k), torch.zeros(numel)
                encode(x, left, left, payload, k, exact)
                results.append((payload, left))
            assert torch.equal(results[0][0], results[1][0]) and same_bits(results[0][1], results[1][1]), (kind, exact, used)


@needs_native
@pytest.mark.parametrize("numel", SIZES)
def test_native_decoding_is_the_references(numel):
    machine = settings_of_the_machine()
    for density, codec in itertools.product(DENSITIES, (TopK, TopKSampled)):
        k, nbytes = kept(density, numel), codec(density).payload_nbytes(numel)
        rows = torch.full((3, nbytes + 32), 0x5A, dtype=torch.uint8)
        for i, row in enumerate(rows):
            codec(density).encode(DATA["mostly zero" if i == 1 else "normal"](numel), row[:nbytes], 0)
        for add in (False, True):
            sums = normal(numel, 3), normal(numel, 3)
            topk.topk_decode_sum(rows, sums[0], k, add)
            used = next(machine)
            native_topk.topk_decode_sum(rows, sums[1], k, add)
            assert same_bits(*sums), (density, add, used)


@needs_native
@pytest.mark.parametrize("byte, value", [(0, 0xFF), (3, 0x80), (-1, 0xFF)])
def test_what_is_no_payload_is_refused(byte, value):
    """A count beyond k, one below zero, a place behind the end."""
    codec, x = TopK(0.01), normal(10_000)
    rows = torch.empty(1, codec.payload_nbytes(10_000), dtype=torch.uint8)
    codec.encode(x, rows[0], 0)
    rows[0, byte] = value
    with pytest.raises(MismatchError, match="10000 elements and k = 100"):
        codec.decode_sum(rows, torch.empty(10_000), 0)


@pytest.mark.parametrize("codec", (TopK(0.01), TopKSampled(0.01), DGC(0.01)), ids=lambda codec: codec.name)
def test_nothing_of_nothing(codec):
    empty = torch.empty(0)
    assert codec.payload_nbytes(0) == 0
    codec.encode(empty, torch.empty(0, dtype=torch.uint8), 0, empty, empty)
    codec.encode_momentum(empty, empty, empty, empty, empty, torch.empty(0, dtype=torch.uint8), 0, 0.9)
    codec.decode_sum(torch.empty(2, 0, dtype=torch.uint8), empty, 0)


@pytest.mark.parametrize("kind", [kind for kind in DATA if kind not in ("not finite", "all NaN", "subnormal", "zeros")])
@pytest.mark.parametrize("codec", (TopK, TopKSampled))
def test_the_stated_bounds_hold(codec, kind):
    """And those of the selected are the largest, in the payload as in what is kept."""
    numel, density = 200_000, 0.01
    x, left, k = DATA[kind](numel), torch.empty(numel), kept(density, numel)
    payload = payload_of(numel, k)
    codec(density).encode(x, payload, 0, None, left)
    index = index_of(payload, numel, k)
    assert np.array_equal(index, (brute_force if codec is TopK else brute_reaching)(x.numpy(), k))
    out = torch.empty(numel)
    codec(density).decode_sum(payload[None], out, 0)
    assert torch.equal(left, x - out)
    most = k if codec is TopK else min(k, threshold.sampling(numel, k, False)[1])
    assert left.double().square().sum() <= (1 - (1 - 2**-16) * most / numel) * x.double().square().sum()
    assert (left[index].abs() <= x[index].abs() * 2**-8).all()


def test_about_k_are_found():
    """Of what is like its sample: over 100 tensors never under 75% and never over 100%, in the mean over 97%."""
    numel, density = 100_000, 0.01
    found = [len(threshold.reaching(normal(numel, seed), kept(density, numel))) / (density * numel) for seed in range(100)]
    assert min(found) >= 0.75 and max(found) <= 1 and np.mean(found) >= 0.97


def test_the_sample_has_a_run_in_every_stratum():
    for numel, size in ((1, 1), (7, 7), (512, 512), (513, 512), (1000, 512), (65537, 4096), (10**12 + 7, 16384)):
        at = threshold.positions(numel, size).numpy()
        assert len(at) == size and at[0] >= 0 and at[-1] < numel and (np.diff(at) > 0).all()
        first = at[::16] if size < numel else at[:1]
        assert (np.diff(at.reshape(len(first), -1)) == 1).all()
        assert np.abs(first - np.arange(len(first)) * (numel / len(first))).max() <= numel / len(first) + 16
    for rows in (1, 3, 5, 8, 16, 100):  # and in no step with the columns of a matrix, however many rows a stratum has
        at = threshold.positions(512 * rows * 768, 512 * 16).numpy() % 768
        hits = np.bincount(at // 16, minlength=48) // 16
        assert hits.min() >= 1 and hits.max() <= 25, "512 runs, about 11 of them in each of 48 places"


def test_samples_are_of_whole_runs():
    for numel, k in itertools.product((1, 511, 512, 513, 16383, 65537, 10**6 + 3, 2**30), (1, 3, 100, 500)):
        if k <= numel:
            size, rank = threshold.sampling(numel, k, False)
            assert size == numel if numel <= 512 else size % 16 == 0 and 512 <= size <= numel
            assert rank >= k / numel * size


@pytest.mark.parametrize("count", (1, 3))
def test_dgc_is_the_papers(count):
    """Algorithm 1 and sections 3.1, 3.2 in numpy, over 20 steps of a rank, on a matrix of rows of different size."""
    numel, momentum, scale, codec = 30_000, 0.9, 0.5, DGC(0.01)
    k, size = kept(0.01, numel), torch.linspace(0.1, 3, numel)
    residual, velocity, payload = torch.zeros(numel), torch.zeros(numel), payload_of(numel, k)
    u, v, total = np.zeros(numel, np.float32), np.zeros(numel, np.float32), np.zeros(numel)
    if library() is not None:
        library().espresso_threads(count, 0)
    for step in range(20):
        x = normal(numel, step) * size
        codec.encode_momentum(x, velocity, velocity, residual, residual, payload, 0, momentum, scale)
        u = np.float32(momentum) * u + np.float32(scale) * x.numpy()
        v = v + u
        mask = np.zeros(numel, bool)
        mask[brute_reaching(v, k)] = True
        sent = torch.from_numpy(v).bfloat16().float().numpy() * mask
        u, v, total = np.where(mask, np.float32(0), u), np.where(mask, v - sent, v), total + sent
        out = torch.empty(numel)
        codec.decode_sum(payload[None], out, 0)
        assert np.array_equal(out.numpy(), sent) and np.array_equal(np.flatnonzero(mask), index_of(payload, numel, k))
        assert np.array_equal(velocity.numpy(), u) and np.array_equal(residual.numpy(), v)
    assert np.count_nonzero(total) > k


def test_the_density_warms_up_as_the_papers():
    """25%, 6.25%, 1.5625%, 0.4%, 0.1% (section 3.3) in four steps of a factor of 0.25, the last of which is not quite that."""
    codec = DGC(0.25**5, warmup_steps=4)
    assert [codec.at(step).density for step in range(5)] == pytest.approx([0.25**i for i in range(1, 6)])
    assert codec.at(4) is codec and codec.at(10**9) is codec and DGC(0.01).at(0) == DGC(0.01)
    densities = [DGC(0.001, warmup_steps=100).at(step).density for step in range(101)]
    assert densities[0] == 0.25 and densities[-1] == 0.001 and all(a > b for a, b in itertools.pairwise(densities))
    assert DGC(0.5, warmup_steps=100).at(0).density == 0.5, "it never sends less than in the end"
    assert codec.at(1).at(0) == codec.at(1), "that of a step is of that step"


def test_huge_tensors_fit_the_index():
    """Indices beyond int32, in blocks that are mostly empty."""
    blocks = (1 << 34) // topk.BLOCK
    index = torch.tensor([0, 32767, 32768, 65535, 65536, (1 << 31) - 1, 1 << 31, (1 << 32) + 40_000, (1 << 34) - 1])
    counts, places = torch.empty(blocks, dtype=torch.int32), torch.empty(len(index), dtype=torch.int16)
    topk.split_index(index, counts, places)
    assert torch.equal(topk.join_index(counts, places), index)

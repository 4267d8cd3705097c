"""Micro-benchmark of codecs: encode and decode seconds by tensor size, what codec work costs the computing beside it (E 4.4), and
what the codec loses.

What is timed is what the runtime will call: `Feedback.encode` and `Codec.decode_sum`, nothing around them. In training a
tensor's residual was last touched a step ago and has left the cache. So every timed call takes the next of several tensors,
and a pool of 32 MiB is read before the first. Medians are reported, after one untimed call for each
tensor. Gradients are Gaussian.
"""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from espresso_ds.compressors.base import Codec, padded
from espresso_ds.compressors.registry import make, resolve
from espresso_ds.core.config import CompressorSettings
from espresso_ds.core.option import Device
from espresso_ds.core.profile import CodecProfile, CodecTimes, CompressorProfile
from espresso_ds.feedback import Feedback, may_sum

from .computing import calibrate, multiply
from .crowding import crowding, in_the_mean
from .relative_error import relative_error

SMALLEST, LARGEST = 1 << 8, 1 << 24
_POOL = 1 << 23
"""Elements over which the tensors of one size are spread: 32 MiB."""
_SUMMED = 2
"""Payloads of a timed sum."""
_PHASE_S = 0.3
_CONTENTION_PHASE_S, _CONTENTION_ROUNDS = 0.2, 3
_PHASE_NUMEL = 1 << 20


def geometric_sizes(largest: int = LARGEST) -> tuple[int, ...]:
    """Sizes from 2^8 by factors of four, ending with `largest` (at most 2^24, beyond which time is proportional to size)."""
    top = max(SMALLEST, min(largest, LARGEST))
    return (*(1 << power for power in range(8, 25, 2) if 1 << power < top), top)


def profile_compressors(
    settings: Sequence[CompressorSettings],
    sizes: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    repeats: int = 9,
    progress: Callable[[float, str], None] | None = None,
    threads: int | None = None,
    barrier: Callable[[], None] = lambda: None,
) -> CompressorProfile:
    """Profile codecs one after the other, on the CPU and, where gradients live on an accelerator, on that too.

    Args:
        settings: each codec and its feedback (the codec's own, if not given): at least one, the one asked for before the
            alternatives to it.
        sizes: elements per tensor, in any order; `geometric_sizes()` if not given.
        device: where gradients live.
        repeats: timed calls per size, at least 1.
        progress: called with the fraction done and what is being done.
        threads: compute threads of a rank while contention is measured; torch's present number if not given.
        barrier: joins the ranks of one host that measure at the same time, so that they are in each other's way as in training.

    Raises:
        FileError, UnsupportedError: some settings describe no codec, or feedback that it cannot have; said before anything is
            measured.
        ValueError: a size or `repeats` is below 1, or there are no settings.
    """
    settings, codecs, device = list(map(resolve, settings)), list(map(make, settings)), torch.device(device)
    wanted = tuple(sorted(set(geometric_sizes() if sizes is None else sizes)))
    if not codecs or not wanted or wanted[0] < 1 or repeats < 1:
        raise ValueError(f"{len(codecs)} codecs, sizes {wanted} and repeats {repeats} must be positive")
    kinds = [torch.device("cpu"), *([device] if device.type != "cpu" else [])]
    threads = threads or torch.get_num_threads()
    profiles = []
    for number, (codec, chosen) in enumerate(zip(codecs, settings, strict=True)):

        def report(fraction: float, what: str, number: int = number) -> None:
            if progress is not None:
                progress((number + fraction) / len(codecs), what)

        times = _profile_times(codec, chosen, wanted, kinds, repeats, report, threads, barrier)
        profiles.append(
            CodecProfile(
                compressor=chosen,
                summable=may_sum(codec, chosen.feedback or "none"),
                votes=codec.votes,
                keeps_scale=codec.contractive or codec.unbiased,
                relative_error=relative_error(codec),
                devices=times,
            )
        )
        report(1.0, f"{chosen.name}: done")
    return CompressorProfile(codecs=tuple(profiles))


def _profile_times(
    codec: Codec,
    settings: CompressorSettings,
    wanted: tuple[int, ...],
    kinds: list[torch.device],
    repeats: int,
    report: Callable[[float, str], None],
    threads: int,
    barrier: Callable[[], None],
) -> tuple[CodecTimes, ...]:
    """Seconds of one codec on every device, for the sizes `wanted`, ascending."""
    share = sum(wanted) + LARGEST / 2  # of one device; measuring contention takes about as long as timing 8M elements
    times = []
    for number, kind in enumerate(kinds):
        encode, decode = [], []
        for index, numel in enumerate(wanted):
            fraction = (number + sum(wanted[:index]) / share) / len(kinds)
            report(fraction, f"{settings.name} on {kind.type}: {numel:,} elements")
            barrier()
            encode_s, decode_s = _time(codec, settings, numel, kind, repeats)
            encode.append(encode_s)
            decode.append(decode_s)
        report((number + sum(wanted) / share) / len(kinds), f"{settings.name} on {kind.type}: beside computing")
        crowded = 1.0
        if kind.type == "cpu":
            call = _codec_call(codec, _memory(settings), kind)
            barrier()
            crowded = crowding(call, _PHASE_S)
        delay = measure_contention(codec, threads, barrier, _memory(settings), kind)
        times.append(
            CodecTimes(
                device=Device.CPU if kind.type == "cpu" else Device.GPU,
                numel=wanted,
                payload_nbytes=tuple(map(codec.payload_nbytes, wanted)),
                encode_s=in_the_mean(wanted, nondecreasing(encode), crowded, _PHASE_NUMEL),
                decode_s=in_the_mean(wanted, nondecreasing(decode), crowded, _PHASE_NUMEL),
                contention=delay,
            )
        )
    return tuple(times)


def measure_contention(
    codec: Codec,
    threads: int,
    barrier: Callable[[], None] = lambda: None,
    memory: Feedback | None = None,
    device: torch.device | str = "cpu",
) -> float:
    """Seconds by which one second of codec work in a background thread delays computing in this thread.

    The median of three rounds, of which each has four phases of about 0.2 s, begun behind `barrier`: codec work alone, computing
    alone (matrix products with `threads` threads), both at once, computing alone again, so that drift cancels. A second of codec
    work is as much of it as took a second alone. "Alone" is alone within the rank: ranks that share a host call this together and
    are in each other's way in every phase. A host that stands still for a moment may stretch one round tenfold.

    Codec work goes through `memory`; without one it is that without feedback.

    0: codec and computing have cores of their own. 1: they take turns on one. More: they also take each other's caches and
    bandwidth.
    """
    device = torch.device(device)
    call, before = _codec_call(codec, memory or Feedback("none"), device), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        products = calibrate(device, _CONTENTION_PHASE_S)
        return statistics.median(_delay(call, products, device, barrier) for _ in range(_CONTENTION_ROUNDS))
    finally:
        torch.set_num_threads(before)


def _delay(call: Callable[[], None], products: int, device: torch.device, barrier: Callable[[], None]) -> float:
    """One round of `measure_contention`."""
    barrier()
    call_s = _repeat(call, device, lambda elapsed: elapsed >= _CONTENTION_PHASE_S)[1]
    barrier()
    first = multiply(products, device)
    stop = threading.Event()
    barrier()
    with ThreadPoolExecutor(1) as pool:
        background = pool.submit(_repeat, call, device, lambda elapsed: stop.is_set())
        try:
            together = multiply(products, device)
        finally:
            stop.set()
        busy_call_s = background.result()[1]
    barrier()
    second = multiply(products, device)
    codec_s = together / busy_call_s * call_s
    return max(0.0, (together - (first + second) / 2) / codec_s)


def nondecreasing(seconds: Sequence[float]) -> tuple[float, ...]:
    """Lower every time to the least of the larger sizes: a disturbance only adds time, so the higher one is the wrong one."""
    return tuple(min(seconds[i:]) for i in range(len(seconds)))


def _time(codec: Codec, settings: CompressorSettings, numel: int, device: torch.device, repeats: int) -> tuple[float, float]:
    """Median seconds of encoding with feedback, and of decoding: half of what a sum of two payloads takes.

    A sum overwrites what was there, so sparse payloads cost the zeros between their elements too.
    """
    tensors = max(1, min(repeats, _POOL // numel))
    pool = torch.randn(max(_POOL, numel), generator=torch.Generator().manual_seed(numel)).mul_(1e-3).to(device)
    stride = len(pool) // tensors // 16 * 16 if tensors > 1 else 0
    grads = [pool[i * stride : i * stride + numel] for i in range(tensors)]
    sums = [torch.zeros_like(grad) for grad in grads]
    nbytes = codec.payload_nbytes(numel)
    payloads = [torch.empty((_SUMMED, padded(nbytes)), dtype=torch.uint8, device=device) for _ in grads]
    for grad, rows in zip(grads, payloads, strict=True):
        for row in rows[1:]:  # the first is encoded anew in every turn
            codec.encode(grad, row[:nbytes], 0)
    memory = _memory(settings)
    encode, decode = [], []
    for turn in range(-tensors, repeats):
        i = turn % tensors
        if turn == 0:
            pool.sum().item()
        start = _now(device)
        memory.encode(codec, grads[i], payloads[i][0, :nbytes], turn + tensors, str(i))
        middle = _now(device)
        codec.decode_sum(payloads[i], sums[i], turn + tensors)
        end = _now(device)
        if turn >= 0:
            encode.append(middle - start)
            decode.append((end - middle) / _SUMMED)
    return statistics.median(encode), statistics.median(decode)


def _memory(settings: CompressorSettings) -> Feedback:
    """The error memory that training has with settings whose feedback is filled in."""
    assert settings.feedback is not None
    return Feedback(settings.feedback, getattr(torch, settings.residual), settings.momentum, settings.clip)


def _now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _codec_call(codec: Codec, memory: Feedback, device: torch.device) -> Callable[[], None]:
    """One encoding and one decoding of a tensor of middling size."""
    grad = torch.randn(_PHASE_NUMEL, generator=torch.Generator().manual_seed(0)).to(device)
    out = torch.zeros_like(grad)
    payload = torch.empty(codec.payload_nbytes(len(grad)), dtype=torch.uint8, device=device)

    def call() -> None:
        memory.encode(codec, grad, payload, 0, "")
        codec.decode_sum(payload[None], out, 0)

    call()
    return call


def _repeat(call: Callable[[], None], device: torch.device, enough: Callable[[float], bool]) -> tuple[int, float]:
    """Call until `enough(elapsed)`, on a stream of its own where the device has streams: (calls, seconds per call)."""
    stream = torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else contextlib.nullcontext()
    with stream:
        start, calls = time.perf_counter(), 0
        while True:
            call()
            calls += 1
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
            elapsed = time.perf_counter() - start
            if enough(elapsed):
                return calls, elapsed / calls

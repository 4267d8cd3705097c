"""Medians and ratios from interleaved repeats.

Every repeat runs all cases once, in turn, so that a disturbance hits them alike; a ratio is the median of each repeat's own
ratio. A case runs several times within a repeat until it has handled some 16 MB, over different arrays. One thread is timed in
its own CPU time, which leaves out what others take of a shared machine (but not what they take of its caches and memory
bandwidth); several threads can only be timed by the clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from rich.progress import track

from espresso_ds.compressors import native
from espresso_ds.compressors.registry import make
from espresso_ds.profiler.codec_speed import ADD, INCREMENT, Arrays, Case, one_repeat, ratio, sets_of

from .cases import ROWS, SUBJECTS, Subject, rendered

SIZES = (1 << 14, 1 << 18, 1 << 20, 1 << 22, 1 << 24)
_IN_CACHE = 1 << 19
"""Elements over which small arrays are spread: 2 MiB of each kind, so that they stay in the cache."""

Rows = list[dict[str, str | int | float | None]]


def seconds_of(cases: Mapping[str, Case], numel: int, repeats: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds per call of every case, one figure for each repeat."""
    repeated = [one_repeat(cases, numel, clock) for _ in track(range(repeats), f"2^{numel.bit_length() - 1} elements")]
    return {name: [repeat[name] for repeat in repeated] for name in cases}


def one_thread(numel: int, repeats: int, plain_repeats: int = 5) -> Rows:
    """Encoding and decoding of every subject beside the limits, and of those with a plain rendering beside that."""
    arrays = Arrays(numel, sets_of(numel, _IN_CACHE))
    cases = arrays.limits()
    for subject in SUBJECTS:
        cases |= {f"{subject.name}: {what}": case for what, case in arrays.coded(subject.settings, ROWS).items()}
    seconds = seconds_of(cases, numel, repeats, time.thread_time)
    rows = []
    for subject in SUBJECTS:
        nbytes = make(subject.settings).at(1 << 30).payload_nbytes(numel)
        versus = _versus_plain(arrays, subject, plain_repeats)
        for what, count in (("encode", 0), ("decode", 1), (f"decode {ROWS}", ROWS)):
            taken = seconds[f"{subject.name}: {what}"]
            moved = 1 + count * nbytes / (8 * numel)  # over the traffic of `out += 1`
            limit = seconds[ADD] if what == "encode" else [moved * second for second in seconds[INCREMENT]]
            quartiles = statistics.quantiles(taken)
            rows.append(
                {
                    "codec": subject.name,
                    "what": what,
                    "numel": numel,
                    "gb_per_s": 4 * numel / statistics.median(taken) / 1e9,
                    "share_of_limit": ratio(limit, taken),
                    "times_plain_torch": versus.get(what),
                    "spread": (quartiles[2] - quartiles[0]) / quartiles[1],
                }
            )
    return rows


def _versus_plain(arrays: Arrays, subject: Subject, repeats: int) -> dict[str, float]:
    if subject.peer is None:
        return {}
    ours, plain = arrays.coded(subject.settings, ROWS), rendered(arrays, subject.peer)
    both = {f"{who} {what}": side[what] for who, side in (("ours", ours), ("plain", plain)) for what in plain}
    seconds = seconds_of(both, arrays.numel, repeats, time.thread_time)
    return {what: ratio(seconds[f"plain {what}"], seconds[f"ours {what}"]) for what in plain}


def two_threads(numel: int, repeats: int) -> Rows:
    """How many times as fast two threads are as one, for kernels with a bar and for `r += g`, by the clock."""
    arrays, barred = Arrays(numel, sets_of(numel, _IN_CACHE)), [subject for subject in SUBJECTS if subject.bar]
    cases = {ADD: arrays.limits()[ADD]}
    for subject in barred:
        cases |= {f"{subject.name}: {what}": case for what, case in arrays.coded(subject.settings, ROWS).items()}

    def with_threads(count: int, case: Case) -> Case:
        def run(i: int) -> None:
            if i == 0:  # the first, untimed call of a repeat sets it, and costs nothing within
                torch.set_num_threads(count)
                native.use_threads(count)
            case(i)

        return run

    both = {f"{count} {name}": with_threads(count, case) for name, case in cases.items() for count in (1, 2)}
    seconds = seconds_of(both, numel, repeats, time.perf_counter)
    torch.set_num_threads(1)
    native.use_threads(1)
    return [{"case": name, "numel": numel, "speed_up": ratio(seconds[f"1 {name}"], seconds[f"2 {name}"])} for name in cases]

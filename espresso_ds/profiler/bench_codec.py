"""`espresso bench codec`: encoding with feedback and decoding, beside `r += g` and a copy of the same arrays in the same run.

Unlike `espresso profile compressors`, whose times a plan is made with, this is for people: how near is each codec to what memory
allows, and which kernels did the work. benchmarks/codecs goes deeper.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import psutil
import torch

from .. import __version__
from ..compressors import backend, native
from ..compressors.registry import CODECS, make, resolve
from ..core.config import CompressorSettings
from ..core.errors import UnsupportedError
from ..core.people import people_bytes
from .bench_report import CodecFacts, CodecReport, CodecRow, LimitRow
from .codec_speed import ADD, COPY, Arrays, Case, one_repeat, ratio, sets_of
from .machine import machine_facts
from .relative_error import relative_error

_SPREAD = 1 << 23
"""Elements over which the arrays of one size are spread, 32 MiB of each kind: a residual was last touched a step ago."""
_ARRAYS = 6
"""Of a codec at work: gradients, residuals, sums, its memory and payloads, and the largest temporaries of plain torch."""


def bench_codecs(
    settings: Sequence[CompressorSettings],
    sizes: Sequence[int],
    device: str,
    threads: int | None,
    trials: int,
    progress: Callable[[float, str], None],
) -> CodecReport:
    """Time codecs one after the other at each size; every trial runs the limits beside the codec.

    Args:
        settings: at least one.
        sizes: bytes of fp32 input, ascending; rounded up to whole elements.
        device: "cpu" or "cuda".
        threads: of kernels and torch on the CPU; torch's present number if not given.
        trials: at least 1.
        progress: called with the share done and what is being done.

    Raises:
        FileError: some settings describe no codec. UnsupportedError: there is no CUDA, or too little memory for a size.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError("--device cuda: torch finds no CUDA device here; use --device cpu")
    place, chosen = torch.device(device), [_spelled_out(each) for each in settings]
    _check_memory(sizes[-1], place)
    before = torch.get_num_threads()
    count = threads or before
    torch.set_num_threads(count)
    native.use_threads(count)
    try:
        facts = [_facts(each, place) for each in chosen]
        numels = sorted({-(-nbytes // 4) for nbytes in sizes})
        limits, rows = [], []
        for number, numel in enumerate(numels):
            share = number / len(numels)

            def tell(fraction: float, what: str, share: float = share, numel: int = numel) -> None:
                progress(share + fraction / len(numels), f"{what}, {people_bytes(4 * numel)}")

            limit, found = _one_size(chosen, numel, place, trials, tell)
            limits.append(limit)
            rows += found
        progress(1.0, "done")
    finally:
        torch.set_num_threads(before)
        native.use_threads(1)
    return CodecReport(
        espresso=__version__,
        device=device,
        threads=count,
        trials=trials,
        machine=machine_facts() | {"threads": count},
        codecs=tuple(facts),
        limits=tuple(limits),
        rows=tuple(rows),
    )


def _one_size(
    settings: Sequence[CompressorSettings], numel: int, device: torch.device, trials: int, tell: Callable[[float, str], None]
) -> tuple[LimitRow, list[CodecRow]]:
    arrays = Arrays(numel, sets_of(numel, _SPREAD), device)
    limits = {name: _synchronised(arrays.limits()[name], device) for name in (ADD, COPY)}
    nbytes, rows = 4 * numel, []
    together: dict[str, list[float]] = {name: [] for name in limits}
    for number, each in enumerate(settings):
        tell(number / len(settings), each.name)
        coded = {what: _synchronised(case, device) for what, case in arrays.coded(each).items()}
        repeats = [one_repeat(limits | coded, numel, time.perf_counter) for _ in range(trials)]
        seconds = {name: tuple(repeat[name] for repeat in repeats) for name in repeats[0]}
        for name in limits:
            together[name] += seconds[name]
        rows.append(
            CodecRow(
                codec=each.label,
                nbytes=nbytes,
                encode_bytes_per_s=nbytes / statistics.median(seconds["encode"]),
                encode_share=ratio(seconds[ADD], seconds["encode"]),
                decode_bytes_per_s=nbytes / statistics.median(seconds["decode"]),
                decode_share=ratio(seconds[COPY], seconds["decode"]),
                payload_ratio=make(each).payload_nbytes(numel) / nbytes,
                encode_s=seconds["encode"],
                decode_s=seconds["decode"],
            )
        )
    add, copy = (nbytes / statistics.median(together[name]) for name in (ADD, COPY))
    return LimitRow(nbytes=nbytes, add_bytes_per_s=add, copy_bytes_per_s=copy), rows


def _spelled_out(settings: CompressorSettings) -> CompressorSettings:
    """The settings with the codec's own feedback and parameters filled in, so that reports name them."""
    defaults = {
        name: value for name, value in CODECS[settings.name].parameters.items() if getattr(settings, name) is None and value
    }
    return resolve(settings).model_copy(update=defaults)


def _synchronised(case: Case, device: torch.device) -> Case:
    """The case, over only when the device is done. Every call waits, as launches would else pile up."""
    if device.type == "cpu":
        return case

    def run(i: int) -> None:
        case(i)
        torch.cuda.synchronize(device)

    return run


def _facts(settings: CompressorSettings, device: torch.device) -> CodecFacts:
    """The codec's error, and the kernels that it gets when it works on a tensor of the device."""
    kernels = {}
    for what, case in Arrays(1 << 10, 1, device).coded(settings).items():
        with backend.asked() as names:
            case(0)
        kernels[what] = _kernels(names, device)
    return CodecFacts(codec=settings.label, relative_error=relative_error(make(settings)), kernels=kernels)


def _kernels(asked: dict[str, bool], device: torch.device) -> str:
    """`native AVX-512`, `triton`, `plain torch`, or both where only some of the work has a kernel."""
    fused = f"native {native.cpu_level()}" if device.type == "cpu" else "triton"
    if not asked or not any(asked.values()):
        return "plain torch"
    return fused if all(asked.values()) else f"{fused} and plain torch"


def _check_memory(nbytes: int, device: torch.device) -> None:
    needed = _ARRAYS * max(nbytes, 4 * _SPREAD)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        raise UnsupportedError(
            f"--sizes: {people_bytes(nbytes)} need about {people_bytes(needed)} of memory, and there are {people_bytes(free)}; "
            "end with a smaller size"
        )

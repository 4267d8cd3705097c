"""One rank of the benchmark: steps of synchronisation with every allocation of torch's counted, thread by thread."""

from __future__ import annotations

import ctypes
import json
import os
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import psutil
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from espresso_ds.compressors import registry
from espresso_ds.core.config import CompressorSettings
from espresso_ds.core.option import Option
from espresso_ds.feedback import Feedback
from espresso_ds.runtime import groups
from espresso_ds.runtime.executor import Compressor, Executor, Unit
from espresso_ds.runtime.lanes import Lanes
from espresso_ds.runtime.paths import Place
from espresso_ds.runtime.synchroniser import Member, Scaling, Synchroniser
from espresso_ds.runtime.trace import Recorder

PLACE = (2, 2)
COMPRESSORS = [
    CompressorSettings(name="efsignsgd"),
    CompressorSettings(name="quantize", bits=4),
    CompressorSettings(name="topk_sampled", density=0.01),
    CompressorSettings(name="dgc", density=0.01, warmup_steps=0),
    CompressorSettings(name="topk", density=0.01, feedback="ef21"),
    CompressorSettings(name="fp16"),
]
OPTIONS = [
    "C.cpu AG.flat D.cpu",
    "C.cpu A2A.flat D.cpu C.cpu AG.flat D.cpu",
    "RS.intra C.cpu A2A.inter D.cpu C.cpu AG.inter D.cpu AG.intra",
    "C.cpu A2A.intra A2A.inter D.cpu C.cpu AG.inter AG.intra D.cpu",
    "C.cpu GA.flat BC.flat D.cpu",
    "RS.flat AG.flat",
    "AR.flat",
]
SIZES = (1_000_003, 250_000, 3, 70_001, 500_000, 65_536)


class Allocations(TorchDispatchMode):
    """Counts the operators of the thread that enters it whose results live in memory of their own."""

    counts: ClassVar[Counter[str]] = Counter()
    on: ClassVar[bool] = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and look whether its result is a view, or an argument."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if Allocations.on:
            given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
            for x in tree_leaves(result):
                if isinstance(x, torch.Tensor) and x.nbytes > 64 and x.untyped_storage().data_ptr() not in given:
                    Allocations.counts[f"{threading.current_thread().name}: {func}"] += 1
        return result


def in_use() -> int:
    """Bytes that the C library has handed out, small and large ones."""

    class Info(ctypes.Structure):
        _fields_ = [
            (name, ctypes.c_size_t)
            for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
        ]

    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Info
    info = mallinfo2()
    return info.uordblks + info.hblkhd


def main(out: Path, warmup: int, steps: int) -> None:
    """Synchronise, watch, and write what was seen on rank 0."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    place = Place(*PLACE, dist.get_rank())
    compressors = [
        Compressor(registry.make(settings), Feedback(settings.feedback or "ef"), 0)
        for settings in map(registry.resolve, COMPRESSORS)
    ]
    units, params, index = [], [], 0
    for text in OPTIONS:
        for codec in range(len(COMPRESSORS)):
            size = SIZES[index % len(SIZES)]
            param = torch.nn.Parameter(torch.zeros(size))
            params.append(param)
            units.append(([Unit(index, f"t{index}", size, Option.parse(text), codec)], [Member(f"t{index}", param)]))
            index += 1
    chunks = [chunk for unit, _ in units for chunk in unit]
    own = groups.make(place, {chunk.option for chunk in chunks}, "gloo", 120.0)
    lanes_needed = max(chunk.steps for chunk in chunks)
    recorder = Recorder(lanes_needed + 1, len(chunks))
    executor = Executor(chunks, compressors, own, torch.float32, "cpu", recorder)
    lanes = Lanes(lanes_needed, 120.0, lambda: Allocations().__enter__())
    synchroniser = Synchroniser(units, executor, lanes, Scaling(1.0, 1 / place.world), torch.float32, recorder)
    generator = torch.Generator().manual_seed(place.rank)
    given = [torch.randn(param.numel(), generator=generator) for param in params]
    for param in params:
        param.grad = torch.zeros_like(param)
    process, memory, seconds = psutil.Process(), [], []
    with Allocations():
        for step in range(warmup + steps):
            for param, values in zip(params, given, strict=True):
                assert param.grad is not None
                param.grad.copy_(values)
            dist.barrier()
            Allocations.on = step >= warmup
            start = time.perf_counter()
            for number in range(len(params)):
                synchroniser.ready(f"t{number}")
            synchroniser.flush()
            seconds.append(time.perf_counter() - start)
            Allocations.on = False
            if step >= warmup - 1:
                memory.append((process.memory_info().rss, in_use()))
    lanes.close()
    own.close()
    if place.rank == 0:
        out.write_text(
            json.dumps(
                {
                    "units": len(chunks),
                    "elements": sum(map(torch.Tensor.numel, params)),
                    "steps": steps,
                    "seconds": seconds[warmup:],
                    "rss": [rss for rss, _ in memory],
                    "in_use": [used for _, used in memory],
                    "allocations": dict(Allocations.counts),
                    "buffer_bytes": executor.buffer_nbytes + synchroniser.buffer_nbytes,
                    "feedback_bytes": sum(compressor.feedback.nbytes for compressor in compressors),
                    "recorder_bytes": recorder.nbytes,
                }
            )
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

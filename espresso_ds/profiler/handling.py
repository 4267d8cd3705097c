"""What a routine costs the computing beside it, whatever its size: hooks, threads that wake each other, the library's calls."""

from __future__ import annotations

import statistics
import time

import torch

from ..core.option import Level, Option
from ..runtime.executor import Executor, Unit
from ..runtime.groups import Groups
from ..runtime.lanes import Lanes
from ..runtime.paths import Place
from ..runtime.synchroniser import Member, Scaling, Synchroniser
from .computing import calibrate, multiply
from .rendezvous import Ranks

_UNITS = 12
_NUMEL = 64
_STEPS = 9
_BETWEEN_S = 5e-3
"""Of computing before each unit is ready: as in training, a routine finds nothing of its own in the caches."""


def measure_handling(ranks: Ranks, threads: int) -> float:
    """Seconds by which a routine delays computing that runs at the same time, however little it sends. Collective.

    Steps of matrix products with `threads` threads, alone and with tiny gradients that become ready in between and are
    synchronised by the runtime, in turns; the difference of their medians for each gradient, on the rank where it is largest.
    0 where another device than a CPU computes: the host's cores do the handling.

    Raises:
        SyncError: a rank failed or ran past the deadline.
    """
    if ranks.device.type != "cpu":
        return 0.0
    place = Place(len(ranks.hosts), ranks.ranks_per_node, ranks.rank)
    units = [Unit(number, f"tiny {number}", _NUMEL, Option.parse("AR.flat")) for number in range(_UNITS)]
    members = [Member(unit.label, torch.nn.Parameter(torch.zeros(_NUMEL))) for unit in units]
    executor = Executor(units, [], Groups(place, {(0, Level.FLAT): ranks.group}), torch.float32)
    lanes = Lanes(1, ranks.timeout_s)
    each = [([unit], [member]) for unit, member in zip(units, members, strict=True)]
    synchroniser = Synchroniser(each, executor, lanes, Scaling(1.0, 1.0), torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        products = calibrate(ranks.device, _BETWEEN_S)

        def step(handled: bool) -> float:
            seconds = multiply(products, ranks.device)
            for member in members:
                if handled:
                    begin = time.perf_counter()
                    synchroniser.ready(member.name)
                    seconds += time.perf_counter() - begin
                seconds += multiply(products, ranks.device)
            if handled:
                synchroniser.flush()
            return seconds

        step(True)
        pairs = [(step(False), step(True)) for _ in range(_STEPS)]
    finally:
        torch.set_num_threads(before)
        lanes.close()
    alone, beside = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
    most = torch.tensor([max(0.0, beside - alone) / _UNITS])
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX, group=ranks.group)
    return float(most)

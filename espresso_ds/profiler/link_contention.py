"""What communication costs the computing beside it: on a CPU the network stack and gloo take cores from backward."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

from ..runtime import routines
from .computing import calibrate, multiply
from .rendezvous import Ranks

_NBYTES = 1 << 20
_PHASE_S = 1.0


def measure_link_contention(ranks: Ranks, threads: int) -> float:
    """Seconds by which one second of communication delays computing that runs at the same time. Collective over all ranks.

    All ranks multiply matrices with `threads` threads, alone and beside allreduces in a background thread, as many on every rank.
    0: communication costs no computing, as where cores are free or the network does its own work.

    Raises:
        SyncError: a rank failed or ran past the deadline.
    """
    buffer = torch.zeros(_NBYTES // 4, device=ranks.device)
    flag = torch.zeros(1, device=ranks.device)

    def meet(value: float) -> float:
        """The largest value of any rank, when all have come."""
        flag.fill_(value)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=ranks.group)
        return float(flag)

    def communicate(count: int) -> None:
        for _ in range(count):
            routines.allreduce(buffer, ranks.group).wait(ranks.timeout_s)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        products = calibrate(ranks.device, _PHASE_S)
        meet(0.0)
        alone_s = multiply(products, ranks.device)
        meet(0.0)
        count = 2
        with ThreadPoolExecutor(1) as pool:
            multiplied, spent_s = 0, 0.0
            for _ in range(2):  # the first time a few, to learn how many fill a phase on the slowest rank
                meet(0.0)
                background = pool.submit(communicate, count)
                multiplied, spent_s = 0, 0.0
                while not background.done():
                    spent_s += multiply(max(1, products // 100), ranks.device)
                    multiplied += max(1, products // 100)
                background.result()
                count = max(2, int(count * _PHASE_S / max(1e-3, meet(spent_s))))
    finally:
        torch.set_num_threads(before)
    rate_alone, rate_beside = products / alone_s, multiplied / spent_s
    return max(0.0, meet(rate_alone / rate_beside) - 1.0)

"""What communication costs the computing beside it: on a CPU the network stack and gloo take cores from backward."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from statistics import median

import torch

from ..runtime import routines
from .computing import calibrate, multiply
from .rendezvous import Ranks

_NBYTES = 1 << 20
_PHASE_S = 0.5
_ROUNDS = 3


def measure_link_contention(ranks: Ranks, threads: int) -> float:
    """Seconds by which one second of communication delays computing that runs at the same time. Collective over all ranks.

    All ranks multiply matrices with `threads` threads, alone and beside allreduces in a background thread, as many on every rank.
    0: communication costs no computing, as where cores are free or the network does its own work. The median of three rounds,
    of which each is alone and beside: a host that stands still for a moment may stretch one of them tenfold.

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

    def beside(pool: ThreadPoolExecutor, count: int, products: int) -> tuple[int, float]:
        """How many products this thread makes, `products` at least, while another has `count` allreduces; and their seconds."""
        meet(0.0)
        multiplied, spent_s = 0, 0.0
        background = pool.submit(communicate, count)
        while multiplied == 0 or not background.done():
            spent_s += multiply(products, ranks.device)
            multiplied += products
        background.result()
        return multiplied, spent_s

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with ThreadPoolExecutor(1) as pool:
            products = calibrate(ranks.device, _PHASE_S)
            few, count = max(1, products // 50), 2
            for _ in range(2):  # how many fill a phase on the slowest rank; the first ones make connections
                count = max(2, int(count * _PHASE_S / max(1e-3, meet(beside(pool, count, few)[1]))))
            slowdowns = []
            for _ in range(_ROUNDS):
                meet(0.0)
                alone_s = multiply(products, ranks.device)
                multiplied, spent_s = beside(pool, count, few)
                slowdowns.append(meet(products / alone_s * spent_s / multiplied))
    finally:
        torch.set_num_threads(before)
    return max(0.0, median(slowdowns) - 1.0)

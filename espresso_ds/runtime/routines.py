"""The routines of the option tree on torch.distributed: started at once, finished by `wait` (E 4.2, table 2).

Every function takes flat contiguous tensors of one dtype and device, with all buffers given by the caller, starts the routine on
`group` and returns a `Started` one. Neither inputs nor outputs may be touched before its `wait` has returned. A group may be a
`torch.distributed.ProcessGroup` or one of its backends (`ProcessGroupGloo`), `root` is a rank within it, W its size. Calls
on one group have to come in the same order on all ranks; several may be in flight. Reductions are sums, and the sum of one
element is computed in one place or in one order, so all ranks that get it get the same bits.

On CUDA these are torch's own collectives. On the CPU (gloo) alltoall, reduce-scatter and gather, and allgather of two ranks, are
sends and receives, with the receives posted first. In gloo's own, a rank that comes a moment late announces its receives behind
its outgoing bytes; the other rank sends only then, and a full-duplex link carries one direction at a time. Sends and receives
also need no copy through a buffer of gloo's and none of its two worker threads. Gloo's allgather of more ranks is a ring, whose
links carry one direction only, and where hosts have several ranks it crosses between hosts less often. Gloo's reduce-scatter is
an allreduce, at twice the bytes.

The functions raise SyncError where another rank is already gone, and for buffers whose sizes don't fit: gloo would read past them
or leave a part of them out. When a rank dies in the middle of a message, gloo may not tell: `wait` then runs to its deadline.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ..core.errors import SyncError
from ..core.option import Task


@dataclass(slots=True)
class Started:
    """A routine under way."""

    task: Task
    works: list[dist.Work]
    on_cuda: bool
    then: Callable[[], object] | None = None
    """What is left to do on this rank once the bytes are here; done by the thread that waits."""

    def wait(self, timeout_s: float) -> None:
        """Return when the outputs hold the result; at once when called again.

        On CUDA the current stream waits and the calling thread does not: the deadline is then the group's own.

        Raises:
            SyncError: the routine failed or `timeout_s` seconds have passed. The group is then of no further use.
        """
        deadline = time.monotonic() + timeout_s
        with _torch_errors(self.task):
            while self.works:
                if self.on_cuda:
                    self.works[0].wait()
                else:  # gloo takes no time at all, and less, for no deadline
                    self.works[0].wait(timedelta(seconds=max(deadline - time.monotonic(), 0.001)))
                self.works.pop(0)  # a send or receive may be waited for only once
        then, self.then = self.then, None
        if then is not None:
            then()


def allreduce(x: Tensor, group: dist.ProcessGroup) -> Started:
    """Replace `x`, shape (n,), by its sum over all ranks."""
    _check(x)
    return _start(Task.ALLREDUCE, x, lambda: group.allreduce([x]))


def allgather(out: Tensor, inp: Tensor, group: dist.ProcessGroup) -> Started:
    """Fill `out`, shape (W * n,), with every rank's `inp`, shape (n,), in rank order."""
    _check(inp, whole=out, parts=group.size())
    if inp.is_cuda or group.size() > 2:
        return _start(Task.ALLGATHER, inp, lambda: group._allgather_base(out, inp))
    return _exchange(Task.ALLGATHER, out.chunk(group.size()), [inp] * group.size(), group)


def reduce_scatter(out: Tensor, inp: Tensor, group: dist.ProcessGroup, scratch: Tensor | None = None) -> Started:
    """Fill `out`, shape (n,), with the sum over all ranks of row `rank` of their `inp`, shape (W * n,).

    On the CPU this is an alltoall and a sum in rank order, in the tensor's dtype; `scratch`, a buffer of its own as large as
    `inp`, saves an allocation there.
    """
    _check(out, whole=inp, parts=group.size())
    if inp.is_cuda:
        return _start(Task.REDUCE_SCATTER, inp, lambda: group._reduce_scatter_base(out, inp, dist.ReduceScatterOptions()))
    received = torch.empty_like(inp) if scratch is None else scratch
    _check(received, whole=inp, parts=1)

    def add_up() -> None:
        first, *others = received.chunk(group.size())
        out.copy_(first)
        for row in others:
            out.add_(row)

    started = alltoall(received, inp, group)
    return Started(Task.REDUCE_SCATTER, started.works, started.on_cuda, add_up)


def reduce(x: Tensor, root: int, group: dist.ProcessGroup) -> Started:
    """Replace `x`, shape (n,), by its sum over all ranks on `root`; what it holds on other ranks afterwards is undefined."""
    _check(x)
    options = dist.ReduceOptions()
    options.rootRank = root
    return _start(Task.REDUCE, x, lambda: group.reduce([x], options))


def broadcast(x: Tensor, root: int, group: dist.ProcessGroup) -> Started:
    """Replace `x`, shape (n,), by the `x` of `root`."""
    _check(x)
    options = dist.BroadcastOptions()
    options.rootRank = root
    return _start(Task.BROADCAST, x, lambda: group.broadcast([x], options))


def alltoall(out: Tensor, inp: Tensor, group: dist.ProcessGroup) -> Started:
    """Send row r of `inp`, shape (W * n,), to rank r, and fill `out`, of the same shape, with what arrives, in rank order."""
    _check(out, whole=inp, parts=1)
    if inp.numel() % group.size():
        raise SyncError(f"alltoall: {inp.numel()} elements are not {group.size()} equal rows; pad the buffer")
    if inp.is_cuda:
        return _start(Task.ALLTOALL, inp, lambda: group.alltoall_base(out, inp, [], []))
    return _exchange(Task.ALLTOALL, out.chunk(group.size()), inp.chunk(group.size()), group)


def gather(out: Tensor | None, inp: Tensor, root: int, group: dist.ProcessGroup) -> Started:
    """Fill `out`, shape (W * n,), with every rank's `inp`, shape (n,), in rank order on `root`; `out` is None on other ranks."""
    if (out is not None) is not (group.rank() == root):
        raise SyncError(
            f"gather: rank {group.rank()} {'has an' if out is not None else 'has no'} output buffer, the root is {root}"
        )
    _check(inp, whole=out, parts=group.size())
    rows = [] if out is None else list(out.chunk(group.size()))
    if inp.is_cuda:
        options = dist.GatherOptions()
        options.rootRank = root
        return _start(Task.GATHER, inp, lambda: group.gather([rows] if rows else [], [inp], options))
    receivers = [inp if rank == root else None for rank in range(group.size())]
    return _exchange(Task.GATHER, rows or [None] * group.size(), receivers, group)


ROUTINES: dict[Task, Callable[..., Started]] = {
    Task.ALLREDUCE: allreduce,
    Task.ALLGATHER: allgather,
    Task.REDUCE_SCATTER: reduce_scatter,
    Task.REDUCE: reduce,
    Task.BROADCAST: broadcast,
    Task.ALLTOALL: alltoall,
    Task.GATHER: gather,
}
"""The function of every routine of `core.option`."""


def _exchange(task: Task, out: Sequence[Tensor | None], inp: Sequence[Tensor | None], group: dist.ProcessGroup) -> Started:
    """Receive row r of `out` from rank r and send it row r of `inp`, where these are given; CPU only.

    Messages between two ranks keep their order, so routines in flight on one group don't mix.
    """
    rank, world = group.rank(), group.size()
    own_out, own_inp = out[rank], inp[rank]
    if own_out is not None and own_inp is not None:
        own_out.copy_(own_inp)
    peers = [(rank + shift) % world for shift in range(1, world)]  # each rank starts with another peer
    with _torch_errors(task):
        # Posted first for the reason at the top of this file; waited for first, since gloo tells only them that a rank is gone.
        works = [group.recv([row], peer, 0) for peer in reversed(peers) if (row := out[peer]) is not None]
        works += [group.send([row], peer, 0) for peer in peers if (row := inp[peer]) is not None]
    return Started(task, works, on_cuda=False)


def _start(task: Task, x: Tensor, collective: Callable[[], dist.Work]) -> Started:
    with _torch_errors(task):
        return Started(task, [collective()], x.is_cuda)


@contextmanager
def _torch_errors(task: Task) -> Iterator[None]:
    """Raise torch's RuntimeError, its one kind for all that may go wrong between ranks, as a SyncError that names the routine."""
    try:
        yield
    except RuntimeError as error:
        raise SyncError(f"{task.name.lower()}: {error}") from error


def _check(part: Tensor, whole: Tensor | None = None, parts: int = 1) -> None:
    """Raise SyncError unless both are flat and contiguous and `whole` is `parts` times as long as `part`."""
    for x in (part, whole):
        if x is not None and (x.dim() != 1 or not x.is_contiguous()):
            raise SyncError(f"buffers are flat and contiguous, not of shape {tuple(x.shape)} and strides {x.stride()}")
    if whole is not None and (whole.numel() != parts * part.numel() or whole.dtype is not part.dtype):
        raise SyncError(
            f"{whole.numel()} elements of {whole.dtype} are not {parts} times {part.numel()} elements of {part.dtype}; "
            "allocate one row per rank"
        )

"""The two rounds of PowerSGD over the ranks, with error feedback and warm start (Vogels et al., NeurIPS 2019, algorithms 1, 2).

| action  | does                                          | then                              |
|---------|-----------------------------------------------|-----------------------------------|
| P       | M = x + error, in place of x;  left = M Q     |                                   |
| AR.flat | sums left                                     |                                   |
| Q       | P = orthogonalise(left);  right = M^T P       |                                   |
| AR.flat | sums right                                    | error = M - P right^T (own right) |
| D       | x = P right^T                                 | Q = orthogonalise(right)          |

The error is that of the rank's own factors, (1 - P P^T) M, and is worked out while the second allreduce is under way. Other
implementations subtract the summed factors instead. The mean over ranks of the two is the same, and so is every output, which
depends on that mean alone. But all that a rank's gradients differ by from the mean then adds up in its error, which grows as the
root of the number of steps and loses digits; here it stays bounded, since every step takes a part of it away.

A step with NaN or Inf in any rank's matrices shows it in the output and leaves the memory as it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..compressors.powersgd import Layout, PowerSGD, is_finite
from ..core.option import Device, Level, Option
from ..feedback.low_rank import LowRankMemory, Turn
from . import routines
from .carrier import NOTHING, Started
from .lanes import Steps
from .streams import Offload


@dataclass(frozen=True)
class LowRankCompressor:
    """PowerSGD, its memory and the seed of its first bases: what `executor.Compressor` is to codecs."""

    codec: PowerSGD
    feedback: LowRankMemory
    seed: int


@dataclass(frozen=True)
class Factors:
    """What a unit keeps between steps beside its memory, float32, where it is factored.

    Attributes:
        left: first factors and uncompressed elements, shape (layout.left_numel,).
        right: second factors, shape (layout.right_numel,).
        own: this rank's second factors, while all ranks' are summed.
        host: the unit itself where it lives on another device; then `wire` is there, for either factors. Else None.
    """

    left: Tensor
    right: Tensor
    own: Tensor
    host: Tensor | None = None
    wire: Tensor | None = None

    @classmethod
    def of(cls, layout: Layout, option: Option, device: torch.device, offload: Offload) -> Factors:
        """The buffers of a unit that lives on `device` and takes `option`, the path of PowerSGD."""
        numels = layout.left_numel, layout.right_numel, layout.right_numel
        if option.actions[0].at is Device.CPU and offload.needed:
            left, right, own, host = (offload.host_buffer(numel, torch.float32) for numel in (*numels, layout.numel))
            return cls(left, right, own, host, torch.empty(max(numels), device=device))
        return cls(*(torch.empty(numel, device=device) for numel in numels))

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(b.nbytes for b in (self.left, self.right, self.own, self.host, self.wire) if b is not None)


class LowRank:
    """One unit that is sent as factors, on one rank. Takes all its buffers at once.

    Args:
        label: name of the unit, for people and for its memory.
        option: the path of PowerSGD.
        layout: of the unit's tensors.
        device: of the unit's buffer.
        memory: where its error and its basis are.
        seed: of the first basis, equal on all ranks.
        groups: of this rank, by lane and level.
        offload: how work on the host comes to the tensors.
    """

    def __init__(
        self,
        label: str,
        option: Option,
        layout: Layout,
        device: torch.device,
        memory: LowRankMemory,
        seed: int,
        groups: Mapping[tuple[int, Level], ProcessGroup],
        offload: Offload,
    ) -> None:
        self.layout = layout
        self.factors = Factors.of(layout, option, device, offload)
        self._label, self._option, self._memory, self._seed = label, option, memory, seed
        self._groups, self._offload = (groups[0, Level.FLAT], groups[1, Level.FLAT]), offload
        self._turn: Turn

    def run(self, x: Tensor, done: Callable[[int, int, int], object] = lambda lane, action, start_ns: None) -> Steps:
        """Sum the unit over all ranks, in place; yields each of the two allreduces once it has started.

        Args:
            x: float32, shape (layout.numel,), contiguous.
            done: called after each action with the lane that it ended on, its number in the option, and when it began, by
                `time.perf_counter_ns`.

        Raises:
            MismatchError: the memory, loaded from a checkpoint, has another size.
        """
        lane = 0
        for number, work in enumerate((self._left, self._sum_left, self._right, self._sum_right, self._decode)):
            start_ns = time.perf_counter_ns()
            with torch.profiler.record_function(f"espresso/{self._option.actions[number]}/{self._label}"):
                started = work(x)
            if started is not None:
                lane += 1
                yield started[0]
                started[1]()
            done(lane, number, start_ns)

    def release(self, x: Tensor, rank: int) -> None:
        """Add to `x` the error of what was sent of it so far; every rank has its own."""
        self._memory.release(x, self._label)

    def forget(self) -> None:
        """Give back the unit's memory."""
        self._memory.forget([self._label])

    def _left(self, x: Tensor) -> None:
        m, factors = self._matrices(x), self.factors
        if m is not x:
            self._offload.fetch(m, x)
        self._turn = self._memory.turn(self._label, self.layout, m, factors.right, self._seed)
        if self._turn.error is not None:
            m.add_(self._turn.error)
        self.layout.encode_left(m, self._turn.basis, factors.left)

    def _sum_left(self, x: Tensor) -> Started:
        return self._allreduce(self.factors.left, self._groups[0])

    def _right(self, x: Tensor) -> None:
        self.layout.encode_right(self._matrices(x), self.factors.left, self.factors.right)
        self.factors.own.copy_(self.factors.right)

    def _sum_right(self, x: Tensor) -> Started:
        started = self._allreduce(self.factors.right, self._groups[1])
        left, own = self.factors.left, self.factors.own
        if self._turn.error_left is not None and is_finite(left) and is_finite(own):
            self._turn.error_left.copy_(self.layout.residual(self._matrices(x), left, own))
        return started

    def _decode(self, x: Tensor) -> None:
        m, factors = self._matrices(x), self.factors
        self.layout.decode(factors.left, factors.right, m)
        if m is not x:
            self._offload.put(x, m)
        if is_finite(factors.left) and is_finite(factors.right):  # sums: bases stay alike on all ranks
            self.layout.renew(self._turn.basis, factors.right)
            self._turn.basis_left.copy_(factors.right)
        else:
            self._turn.stay()

    def _matrices(self, x: Tensor) -> Tensor:
        return x if self.factors.host is None else self.factors.host

    def _allreduce(self, factors: Tensor, group: ProcessGroup) -> Started:
        """Start to sum in place; a unit of vectors alone has no second factors to sum, on any rank."""
        if not factors.numel():
            return NOTHING, _nothing
        if self.factors.wire is None:
            return routines.allreduce(factors, group), _nothing
        wire = self.factors.wire[: factors.numel()]
        self._offload.put(wire, factors)
        return routines.allreduce(wire, group), lambda: self._offload.fetch(factors, wire)


def _nothing() -> None:
    pass

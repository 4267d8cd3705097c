"""All ranks agree before the first step, or all stop with the same message."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from ..core.errors import EspressoError, MismatchError, SyncError
from ..core.record import fingerprint

_meetings = itertools.count()


def meet(timeout_s: float) -> None:
    """Wait until every rank of the default group has come here; ranks without a plan never do and would leave the others hanging.

    Raises:
        MismatchError: ranks are missing after `timeout_s` seconds; they are named.
    """
    store, world = dist.distributed_c10d._get_default_store(), dist.get_world_size()
    meeting = next(_meetings)
    keys = [f"espresso/{meeting}/{rank}" for rank in range(world)]
    store.set(keys[dist.get_rank()], "")
    try:
        store.wait(keys, timedelta(seconds=timeout_s))
    except RuntimeError:
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        raise MismatchError(
            f"after {timeout_s:g} s ranks {missing} have not come with a plan; give every rank the same one: launch with "
            "`deepspeed --espresso_config plan.json` (mpirun: `-x ESPRESSO_CONFIG`), and check each host with `espresso doctor`"
        ) from None


class Agreement:
    """Collects this rank's error, if any, so that no rank goes on alone; then compares what all ranks hold.

    Args:
        group: a process group of all ranks that can exchange Python objects (gloo, or nccl with a device set).
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self._error: EspressoError | None = None

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Keep an EspressoError of the body for `settle` instead of raising it on this rank alone."""
        try:
            yield
        except EspressoError as error:
            self._error = self._error or error

    def settle(self, items: Mapping[str, str] | None = None) -> None:
        """Raise the same error on every rank if any rank collected one or if `items` differ between ranks.

        Args:
            items: name -> text, in order; what every rank must hold alike.

        Raises:
            EspressoError: the kind and message of the first failing rank, with its number if not all failed alike.
            MismatchError: naming the first item that differs and two ranks with their values.
        """
        error = self._error
        digest = fingerprint(list((items or {}).items()))
        told = self._exchange((type(error), str(error)) if error else digest)
        failed = {rank: said for rank, said in enumerate(told) if isinstance(said, tuple)}
        if failed:
            rank, (kind, message) = next(iter(failed.items()))
            alike = len(failed) == len(told) and len(set(failed.values())) == 1
            raise kind(message if alike else f"rank {rank}: {message}")
        if len(set(told)) > 1:
            raise MismatchError(_first_difference(self._exchange(dict(items or {}))))

    def _exchange(self, value: object) -> list:
        told: list = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(told, value, group=self._group)
        return told


def largest(values: Sequence[float], group: ProcessGroup, timeout_s: float) -> list[float]:
    """The largest of each value over all ranks of `group`, the same bits on every rank. Collective.

    Raises:
        SyncError: a rank is gone, or has not come after `timeout_s`.
    """
    found, options = torch.tensor(values, dtype=torch.float64), dist.AllreduceOptions()
    options.reduceOp = dist.ReduceOp(dist.ReduceOp.MAX)
    try:
        group.allreduce([found], options).wait(timedelta(seconds=timeout_s))
    except RuntimeError as error:
        raise SyncError(f"comparing times over all ranks: {error}") from error
    return found.tolist()


def _first_difference(told: list[dict[str, str]]) -> str:
    for rank, other in enumerate(told):
        for (name, value), (its_name, its_value) in zip(told[0].items(), other.items(), strict=False):
            if (name, value) != (its_name, its_value):
                return (
                    f"ranks disagree: rank 0 has {name} = {value}, rank {rank} has {its_name} = {its_value}; "
                    "give every rank the same plan, model and config"
                )
        if len(told[0]) != len(other):
            longer = told[0] if len(told[0]) > len(other) else other
            extra = list(longer)[min(len(told[0]), len(other))]
            return f"ranks disagree: {extra} stands on rank {0 if longer is told[0] else rank} only (ranks 0 and {rank} compared)"
    return "ranks disagree, but the items compare equal on exchange; start again"

"""One plan on all ranks: those that were told of it and do not have it get it from one that does, over the process group.

So the file has to lie on one host only, whichever, and a launcher need not carry it. All ranks come to the same verdict, since
each makes it from what all have told.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from ..core.errors import EspressoError, FileError, MismatchError
from ..runtime.agree import Agreement, meet
from .plan_source import HASH_ENV, PATH_ENV, Absent, Source, sent


@dataclass(frozen=True)
class Told:
    """What a rank tells the others.

    Attributes:
        host: the rank's host name.
        lacks: why it has no plan, or None where it has one.
        hash: of its plan file; empty where it has none or its plan came with the script's config.
    """

    host: str
    lacks: str | None
    hash: str


def share(own: Source | Absent, fault: EspressoError | None, deadline_s: float) -> Source:
    """This rank's plan, from another rank where it has none itself. Collective over all ranks that were told of a plan.

    Args:
        own: what this rank found.
        fault: what finding it raised, for all ranks to hear.
        deadline_s: seconds to wait for the other ranks.

    Raises:
        EspressoError: alike on every rank: a rank's plan is unsound, ranks have different ones, or nobody has it.
    """
    meet(deadline_s)
    group = dist.new_group(backend="gloo")
    try:
        return _share(own, fault, group)
    finally:
        dist.destroy_process_group(group)


def _share(own: Source | Absent, fault: EspressoError | None, group: dist.ProcessGroup) -> Source:
    agreement = Agreement(group)
    with agreement.collecting():
        if fault is not None:
            raise fault
    agreement.settle()
    mine = Told(socket.gethostname(), own.why, "") if isinstance(own, Absent) else Told(socket.gethostname(), None, own.hash)
    told = [mine] * dist.get_world_size()
    dist.all_gather_object(told, mine, group=group)
    path = os.environ.get(PATH_ENV, "the plan")
    giver = giving_rank(told, path, os.environ.get(HASH_ENV))
    if giver is not None:
        box = [None if isinstance(own, Absent) else own.ds_config]
        dist.broadcast_object_list(box, giver, group=group)
        with agreement.collecting():
            if isinstance(own, Absent) and box[0] is not None:
                own = sent(box[0], f"{path}, sent by rank {giver} on {told[giver].host}")
        agreement.settle()
    assert isinstance(own, Source)
    return own


def giving_rank(told: Sequence[Told], path: str, expected: str | None) -> int | None:
    """The rank that gives its plan to those that lack it, or None where none lacks it.

    Args:
        told: what each rank has told, by rank.
        path: the plan's file, for messages.
        expected: the plan's hash as the launcher sent it, if it did.

    Raises:
        MismatchError: plan files differ between ranks.
        FileError: a rank lacks the plan and none has it.
    """
    holders = [rank for rank, one in enumerate(told) if one.hash]
    if odd := next((rank for rank in holders if told[rank].hash != told[holders[0]].hash), None):
        first = told[holders[0]]
        raise MismatchError(
            f"{path} differs: rank {holders[0]} on {first.host} has one of hash {first.hash}, rank {odd} on {told[odd].host} "
            f"one of hash {told[odd].hash}; copy the right one to all hosts, or leave it on one host only"
        )
    lacking = {one.host: one.lacks for one in told if one.lacks is not None}
    if not lacking:
        return None
    if not holders:
        found = "; ".join(f"{host}: {why}" for host, why in lacking.items())
        name, cure = path, ", or launch with `deepspeed --espresso_config`, which sends the plan along"
        if expected:
            name, cure = f"{path} (hash {expected})", "; it is too large to travel with this launcher"
        raise FileError(f"{name}: no rank has this plan ({found}); copy the file to any one of these hosts{cure}")
    return holders[0]

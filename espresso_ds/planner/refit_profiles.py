"""The three profiles that a plan is made from, and the same with corrections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ..core.errors import MismatchError
from ..core.option import Device, Task
from ..core.plan import Plan
from ..core.profile import ClusterProfile, CodecTimes, CompressorProfile, ModelTrace, RoutineCost
from .build import in_wire_order, units_of
from .cost import Costs, Resource
from .curves import undisturbed
from .refit_compute import Compute
from .refit_costs import Line, never_faster, worst
from .timeline import Unit

CodecKey = tuple[int, Device, Task]
RoutineKey = tuple[Task, str, int]
"""Routine, level, groups that ran it at once."""


class Profiles(NamedTuple):
    """The three that a plan is made from."""

    trace: ModelTrace
    cluster: ClusterProfile
    compressors: CompressorProfile

    def check(self, plan: Plan, name: str) -> None:
        """Raise MismatchError unless the plan was made from these."""
        for kind, profile in self._asdict().items():
            if plan.profiles.get(kind) != profile.fingerprint:
                raise MismatchError(
                    f"{name} was made from {kind} profile {plan.profiles.get(kind)}, not from this one ({profile.fingerprint}); "
                    "give the files that the plan was made from"
                )


class Model(NamedTuple):
    """The plan as its profiles have it."""

    units: list[Unit]
    trace: ModelTrace
    costs: Costs

    @classmethod
    def of(cls, plan: Plan, profiles: Profiles) -> Model:
        """The plan's units, with what the profiles say they cost. Raises FileError."""
        trace = in_wire_order(profiles.trace)
        return cls(units_of(plan, trace), trace, Costs(profiles.cluster, profiles.compressors, trace.wire_dtype))

    def pieces(self) -> list[Unit]:
        """What travels as one buffer, as `run_units` has it."""
        return [piece for unit in self.units for piece in unit.pieces(self.costs.world)]

    def seconds(self) -> list[list[float]]:
        """Of each action of each piece."""
        walks = (self.costs.walk(piece.option, piece.numel, piece.codec) for piece in self.pieces())
        return [[step.seconds for step in walk.steps] for walk in walks]


def link_of(level: str, nodes: int) -> Resource:
    """What routines of a level occupy."""
    return Resource.INTRA if level == "intra" or nodes == 1 else Resource.INTER


def corrected_trace(trace: ModelTrace, compute: Compute) -> ModelTrace:
    """The trace at the speed of the run."""
    return trace.model_copy(
        update={
            "forward_s": trace.forward_s * compute.before,
            "backward_s": trace.backward_s * compute.backward,
            "after_s": trace.after_s * compute.before,
            "tensors": tuple(
                tensor.model_copy(update={"ready_s": tensor.ready_s * compute.backward}) for tensor in trace.tensors
            ),
        }
    )


def corrected_cluster(
    cluster: ClusterProfile,
    links: Mapping[Resource, Line],
    routines: Mapping[tuple[Resource, RoutineKey], Line],
    compute: Compute,
) -> ClusterProfile:
    """The cluster with the lines of its links and the factors of its routines; what was not used, like the worst that was."""

    def corrected(cost: RoutineCost) -> RoutineCost:
        link = link_of(str(cost.level), cluster.nodes)
        line = links.get(link) or never_faster(worst(tuple(links.values())))
        factor = routines.get((link, (cost.routine, str(cost.level), cost.groups)))
        if factor is None:
            factor = worst([known for (where, _), known in routines.items() if where is link])
        seconds = tuple(factor.scale * line(s) for s in undisturbed(cost.nbytes, cost.seconds))
        slope = factor.scale * line.scale
        alpha_s = min(factor.scale * line(cost.alpha_s), seconds[0])
        return cost.model_copy(update={"seconds": seconds, "alpha_s": alpha_s, "beta_s_per_byte": slope * cost.beta_s_per_byte})

    changed = {"contention": compute.link_contention, "routines": tuple(map(corrected, cluster.routines))}
    return cluster.model_copy(update=changed)


def corrected_compressors(
    compressors: CompressorProfile, codecs: Mapping[CodecKey, Line], compute: Compute, contention: float
) -> CompressorProfile:
    """The codecs with their lines; `contention` is what the profile came to. What the run did not use, like the worst it did."""

    def line(codec: int, device: Device, task: Task) -> Line:
        if (codec, device, task) in codecs:
            return codecs[codec, device, task]
        alike = [line for (_, where, what), line in codecs.items() if (where, what) == (device, task)]
        return never_faster(worst(alike or [line for (_, where, _), line in codecs.items() if where is device]))

    def corrected(codec: int, times: CodecTimes) -> CodecTimes:
        encode, decode = (line(codec, times.device, task) for task in (Task.COMPRESS, Task.DECOMPRESS))
        delay = times.contention
        if times.device is Device.CPU:
            delay = delay * compute.contention / contention if contention > 0 else compute.contention
        changed = {
            "encode_s": tuple(map(encode, times.encode_s)),
            "decode_s": tuple(map(decode, times.decode_s)),
            "contention": delay,
        }
        return times.model_copy(update=changed)

    return compressors.model_copy(
        update={
            "codecs": tuple(
                codec.model_copy(update={"devices": tuple(corrected(number, times) for times in codec.devices)})
                for number, codec in enumerate(compressors.codecs)
            )
        }
    )

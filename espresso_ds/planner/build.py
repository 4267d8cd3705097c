"""From three profiles to a plan: check that they belong together, search, and write every decision down with its reason."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.config import EspressoBlock
from ..core.errors import FileError, MismatchError
from ..core.option import UNCOMPRESSED, Device, Option
from ..core.plan import MadeFor, Plan, Prediction, TensorDecision
from ..core.profile import ClusterProfile, CompressorProfile, ModelTrace
from .chunk import best_chunk, chunked
from .cost import Costs
from .decide import Trials, beyond_gain
from .search import Progress, plan_compressed, plan_uncompressed
from .timeline import Timeline, Unit, iteration_time, simulate, stock_time, stock_timeline
from .tree import flat_options, summable_options


def make_plan(
    trace: ModelTrace,
    cluster: ClusterProfile,
    compressors: CompressorProfile,
    *,
    made_by: str,
    uncompressed: bool = False,
    thrift: float = EspressoBlock().thrift,
    progress: Progress = lambda stage, done, total: None,
) -> Plan:
    """Decide for every tensor and predict the step.

    Args:
        trace: gradient sizes and ready times.
        cluster: measured routines.
        compressors: measured codec times and payload sizes.
        made_by: program and version, for people.
        uncompressed: allreduce everything, overlapped with backward and fused, even where compression would pay.
        thrift: share of the fastest plan's step given for leaving uncompressed what compression helps least.
        progress: called with (stage, done, total) during the search.

    Returns:
        The sealed plan, tensors in the order on the wire, which is that of their ready times.

    Raises:
        MismatchError: trace and cluster profile are of different worlds.
        FileError: a routine or device that the search needs was not measured, or a profile is not sound.
    """
    _check_worlds(trace, cluster)
    fingerprints = {"trace": trace.fingerprint, "cluster": cluster.fingerprint, "compressors": compressors.fingerprint}
    trace = in_wire_order(trace)
    costs = Costs(cluster, compressors, trace.wire_dtype)
    plain = plan_uncompressed(trace, costs)
    options = candidate_options(trace, compressors)
    units = plain if uncompressed else plan_compressed(options, trace, costs, plain, thrift, progress)
    chunk_numel = None if uncompressed else best_chunk(units, trace, costs)
    pieces = chunked(units, chunk_numel, costs.world)
    predicted = Prediction(
        compute_s=trace.compute_s,
        stock_s=stock_time(trace, costs),
        uncompressed_s=simulate(plain, trace, costs).iteration_s,
        planned_s=iteration_time(pieces, trace, costs),
        uncompressed_bytes=_sent_bytes(plain, costs),
        planned_bytes=_sent_bytes(pieces, costs),
    )
    reasons = [(0.0, "uncompressed, as asked")] * len(units) if uncompressed else _reasons(units, options, trace, costs)
    tensors = tuple(
        TensorDecision(
            name=tensor.name,
            shape=tensor.shape,
            dtype=tensor.dtype,
            numel=tensor.numel,
            option=str(unit.option),
            unit=number,
            firings=tensor.firings,
            saves_s=saves_s,
            why=why,
        )
        for number, (unit, (saves_s, why)) in enumerate(zip(units, reasons, strict=True))
        for tensor in trace.tensors[unit.start : unit.stop]
    )
    return Plan(
        made_by=made_by,
        made_for=MadeFor(
            nodes=cluster.nodes, ranks_per_node=cluster.ranks_per_node, model=trace.model_fingerprint, config=trace.config
        ),
        profiles=fingerprints,
        compressor=compressors.compressor,
        predicted=predicted,
        chunk_numel=chunk_numel,
        tensors=tensors,
    ).sealed()


def in_wire_order(trace: ModelTrace) -> ModelTrace:
    """The trace with its tensors sorted by ready time; equal times keep their order."""
    return trace.model_copy(update={"tensors": tuple(sorted(trace.tensors, key=lambda tensor: tensor.ready_s))})


def candidate_options(trace: ModelTrace, compressors: CompressorProfile) -> tuple[Option, ...]:
    """The options to choose from: the flat tree over the measured devices that training has, and sums of payloads.

    Raises:
        FileError: codecs were measured on no device that training has.
    """
    usable = (Device.CPU,) if trace.device == "cpu" else (Device.GPU, Device.CPU)
    measured = {times.device for times in compressors.devices}
    devices = [device for device in usable if device in measured]
    if not devices:
        raise FileError(
            f"compressor profile: measured on {', '.join(sorted(measured)) or 'no device'}, but the model was traced on "
            f"{trace.device}; measure there with `{CompressorProfile.MADE_BY}`"
        )
    return flat_options(devices) + (summable_options(devices) if compressors.summable else ())


def timelines_of(plan: Plan, trace: ModelTrace, cluster: ClusterProfile, compressors: CompressorProfile) -> dict[str, Timeline]:
    """Predicted timelines of DeepSpeed as it is, of the uncompressed overlapped plan and of `plan`, for pictures.

    Raises:
        MismatchError: the profiles are not those that the plan was made from.
        FileError: a cost was not measured.
    """
    given = {"trace": trace.fingerprint, "cluster": cluster.fingerprint, "compressors": compressors.fingerprint}
    for kind, fingerprint in given.items():
        if plan.profiles.get(kind) != fingerprint:
            raise MismatchError(
                f"the plan was made from {kind} profile {plan.profiles.get(kind)}, not from this one ({fingerprint}); "
                f"give that file, or make the plan again with `{Plan.MADE_BY}`"
            )
    trace = in_wire_order(trace)
    costs = Costs(cluster, compressors, trace.wire_dtype)
    return {
        "DeepSpeed": stock_timeline(trace, costs),
        "uncompressed, overlapped": simulate(plan_uncompressed(trace, costs), trace, costs),
        "planned": simulate(chunked(units_of(plan, trace), plan.chunk_numel, costs.world), trace, costs),
    }


def units_of(plan: Plan, trace: ModelTrace) -> list[Unit]:
    """The units of a plan whose tensors are those of `trace`, in its order."""
    units, start = [], 0
    for group in plan.units():
        units.append(Unit.of(trace, start, start + len(group), Option.parse(group[0].option)))
        start += len(group)
    return units


def _check_worlds(trace: ModelTrace, cluster: ClusterProfile) -> None:
    traced = (trace.world_size, trace.ranks_per_node)
    profiled = (cluster.world_size, cluster.ranks_per_node)
    if traced != profiled:
        raise MismatchError(
            f"the model was traced with {traced[0]} ranks ({traced[1]} per node), the cluster profile is of {profiled[0]} ranks "
            f"({profiled[1]} per node); take the one that is wrong again with the hostfile of the training: "
            f"`{ModelTrace.MADE_BY}` or `{ClusterProfile.MADE_BY}`"
        )


def _sent_bytes(units: Sequence[Unit], costs: Costs) -> int:
    return round(sum(costs.walk(unit.option, unit.numel).sent_bytes for unit in units))


def _reasons(units: Sequence[Unit], options: Sequence[Option], trace: ModelTrace, costs: Costs) -> list[tuple[float, str]]:
    """For each unit the seconds that its option saves against uncompressed, and the reason in words."""
    trials, hidden = Trials(units, trace, costs), beyond_gain(simulate(units, trace, costs), costs)
    reasons = []
    for index, unit in enumerate(units):
        saves_s = 0.0 if unit.option == UNCOMPRESSED else trials.time_with(index, UNCOMPRESSED) - trials.time
        if index in hidden and not unit.option.compresses:
            reasons.append((saves_s, "hidden: sent before a bubble, compressing gains nothing"))
            continue
        others = [option for option in options if option.compresses and option != unit.option]
        next_s, other = trials.best(index, others, below=float("inf"))
        more = "" if other is None else f"{other} {_more(next_s - trials.time)}"
        if unit.option == UNCOMPRESSED:
            reasons.append((saves_s, f"not worth compressing: the best way, {more}" if more else "no other option"))
        else:
            reasons.append((saves_s, f"saves {_ms(saves_s)} against uncompressed" + (f"; next best {more}" if more else "")))
    return reasons


def _more(seconds: float) -> str:
    """How another option compares. One that is better alone does occur: the search is greedy and asks for a gain worth having."""
    if abs(seconds) < 5e-7:
        return "takes as long"
    return f"costs {_ms(seconds)} more" if seconds > 0 else f"would save {_ms(-seconds)}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"

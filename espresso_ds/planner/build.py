"""From three profiles to a plan: check that they belong together, search, and write every decision down with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..core.config import Constraints, EspressoBlock
from ..core.errors import FileError, MismatchError
from ..core.option import Device, Option
from ..core.plan import MadeFor, Plan, Prediction, TensorDecision
from ..core.profile import ClusterProfile, CompressorProfile, ModelTrace
from .baselines import Search
from .bound import lower_bound
from .cost import Costs
from .limits import Limits
from .menu import Choice, Menu
from .reasons import reasons
from .search import Progress, best_plan, best_uncompressed, certified_plan
from .step_prediction import step_prediction
from .thrift import spare
from .timeline import Timeline, Unit, simulate, stock_time, stock_timeline
from .tree import allowed, is_exact, option_tree
from .trials import Trials

NO_CONSTRAINTS = Constraints()

WORTHWHILE = 0.01
"""Least share of the uncompressed step that compression must save: less is within the noise of any step time, and it is lossy."""


def make_plan(
    trace: ModelTrace,
    cluster: ClusterProfile,
    compressors: CompressorProfile,
    *,
    made_by: str,
    uncompressed: bool = False,
    thrift: float = EspressoBlock().thrift,
    constraints: Constraints = NO_CONSTRAINTS,
    error_budget: float | None = None,
    search: Search | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Plan:
    """Decide for every tensor and predict the step.

    Args:
        trace: gradient sizes and ready times.
        cluster: measured routines.
        compressors: measured codec times and payload sizes; the planner may use any of its codecs for any tensor.
        made_by: program and version, for people.
        uncompressed: allreduce everything, overlapped with backward and fused, even where compression would pay.
        thrift: share of the fastest plan's step given for leaving uncompressed what compression helps least.
        constraints: what the plan must keep to.
        error_budget: most relative error, as the mean over all elements.
        search: in place of ours, such as one of `baselines.CRIPPLED`; thrift and limits are then its own affair.
        progress: called with (stage, done, total) during the search.

    Returns:
        The sealed plan, tensors in the order on the wire, which is that of their ready times.

    Raises:
        MismatchError: trace and cluster profile are of different worlds.
        FileError: a routine or device that the search needs was not measured, a profile is not sound, or the constraints
            leave nothing to choose from.
    """
    _check_worlds(trace, cluster)
    fingerprints = {"trace": trace.fingerprint, "cluster": cluster.fingerprint, "compressors": compressors.fingerprint}
    trace = in_wire_order(trace)
    costs = Costs(cluster, compressors, trace.wire_dtype)
    menu = make_menu(trace, costs, constraints)
    limits = limits_of(trace, menu, constraints, error_budget)
    plain = best_uncompressed(trace, menu)
    units, bound_s = plain, 0.0
    if search is not None:
        units = search(trace, menu)
    elif not uncompressed:
        units, bound_s = _worthwhile(plain, trace, menu, limits, thrift, progress)
    planned_s = Trials(units, trace, menu).time
    predicted = Prediction(
        compute_s=trace.compute_s,
        stock_s=stock_time(trace, costs),
        uncompressed_s=Trials(plain, trace, menu).time,
        planned_s=planned_s,
        uncompressed_bytes=_sent_bytes(plain, costs),
        planned_bytes=_sent_bytes(units, costs),
        lower_bound_s=bound_s or lower_bound(trace, menu, planned_s, limits.exact).seconds,
        free_compression_s=free_compression_s(trace, menu, limits, planned_s),
    )
    why = [(0.0, "uncompressed, as asked")] * len(units) if uncompressed else reasons(units, trace, menu, limits)
    tensors = tuple(
        TensorDecision(
            name=tensor.name,
            shape=tensor.shape,
            dtype=tensor.dtype,
            numel=tensor.numel,
            option=str(unit.option),
            codec=unit.codec,
            unit=number,
            chunk_numel=unit.chunk_numel if unit.option.compresses else None,
            firings=tensor.firings,
            saves_s=saves_s,
            why=text,
        )
        for number, (unit, (saves_s, text)) in enumerate(zip(units, why, strict=True))
        for tensor in trace.tensors[unit.start : unit.stop]
    )
    return Plan(
        made_by=made_by,
        made_for=made_for(trace, cluster),
        profiles=fingerprints,
        compressors=tuple(codec.compressor for codec in compressors.codecs),
        predicted=predicted,
        tensors=tensors,
        step=step_prediction(units, trace, costs),
    ).sealed()


def made_for(trace: ModelTrace, cluster: ClusterProfile) -> MadeFor:
    """What a plan from these profiles holds for."""
    return MadeFor(
        nodes=cluster.nodes,
        ranks_per_node=cluster.ranks_per_node,
        model=trace.model_fingerprint,
        config=trace.config,
        cluster=cluster.kind,
    )


def make_menu(trace: ModelTrace, costs: Costs, constraints: Constraints = NO_CONSTRAINTS) -> Menu:
    """Every option that cluster, codecs and constraints leave, with every codec that can do it.

    Raises:
        FileError: codecs were measured on no device that training has, no routine was measured, or nothing is left to choose.
    """
    usable = (Device.CPU,) if trace.device == "cpu" else (Device.GPU, Device.CPU)
    choices: dict[Choice, None] = {}
    for number, codec in enumerate(costs.codecs):
        measured = {times.device for times in codec.devices}
        devices = tuple(device for device in usable if device in measured)
        if not devices:
            raise FileError(
                f"compressor profile: {codec.compressor.name} was measured on {', '.join(sorted(measured)) or 'no device'}, "
                f"but the model was traced on {trace.device}; measure there with `{CompressorProfile.MADE_BY}`"
            )
        if constraints.summable_only and not codec.summable:
            continue
        for option in allowed(option_tree(devices, codec.summable), constraints, *costs.shape):
            unfit = option.unfit_for(summable=codec.summable, votes=codec.votes, keeps_scale=codec.keeps_scale)
            if unfit is None and costs.has(option):
                choices[Choice(option, number if option.compresses else 0)] = None
    if not any(not choice.option.compresses for choice in choices):
        names = ", ".join(codec.compressor.name for codec in costs.codecs)
        if constraints.summable_only and not any(codec.summable for codec in costs.codecs):
            raise FileError(f"constraints: summable_only, but payloads of {names} cannot be summed; add such a codec, or drop it")
        raise FileError(
            f"cluster profile: no routine of an uncompressed option was measured with {costs.world} ranks; "
            f"measure it with `{ClusterProfile.MADE_BY}`"
        )
    return Menu(tuple(choices), costs)


def limits_of(trace: ModelTrace, menu: Menu, constraints: Constraints, error_budget: float | None) -> Limits:
    """What the constraints leave of the menu for each tensor and for all together; the trace is in the order of the wire."""
    exact = [index for index, tensor in enumerate(trace.tensors) if is_exact(tensor.name, constraints.exact)]
    return Limits(trace, menu, exact, constraints.residual_bytes, error_budget)


def _worthwhile(
    plain: list[Unit], trace: ModelTrace, menu: Menu, limits: Limits, thrift: float, progress: Progress
) -> tuple[list[Unit], float]:
    """The best plan, after thrift, or `plain` if that is hardly slower; and the lower bound if it was worked out."""
    limit = Trials(plain, trace, menu).time * (1 - WORTHWHILE)
    if trace.compute_s >= limit:
        return plain, 0.0  # even synchronisation that takes no time would not be worth it
    units, bound = certified_plan(trace, menu, limits, progress)
    planned_s = Trials(units, trace, menu).time
    if planned_s > limit:
        return plain, bound.seconds
    return spare(units, trace, menu, limits, min(limit, planned_s * (1 + thrift))), bound.seconds


def free_compression_s(trace: ModelTrace, menu: Menu, limits: Limits, planned_s: float) -> float:
    """E's upper bound of the speed: the step of the best plan found if codecs took no time; never above `planned_s`."""
    free = Menu(menu.catalogue, menu.costs.with_free_codecs())
    return min(planned_s, Trials(best_plan(trace, free, limits), trace, free).time)


def in_wire_order(trace: ModelTrace) -> ModelTrace:
    """The trace with its tensors sorted by ready time; equal times keep their order. Raises FileError if it is not sound."""
    if not trace.tensors:
        raise FileError(f"model trace: holds no tensors; trace a model with parameters to train by `{ModelTrace.MADE_BY}`")
    last = max(trace.tensors, key=lambda tensor: tensor.ready_s)
    if last.ready_s > trace.backward_s * 1.01:
        raise FileError(
            f"model trace: {last.name!r} is ready after {last.ready_s:g} s, but backward takes {trace.backward_s:g} s; "
            f"give all times in seconds, or trace again with `{ModelTrace.MADE_BY}`"
        )
    return trace.model_copy(update={"tensors": tuple(sorted(trace.tensors, key=lambda tensor: tensor.ready_s))})


def timelines_of(
    plan: Plan,
    trace: ModelTrace,
    cluster: ClusterProfile,
    compressors: CompressorProfile,
    constraints: Constraints = NO_CONSTRAINTS,
) -> dict[str, Timeline]:
    """Predicted timelines of DeepSpeed as it is, of the uncompressed overlapped plan and of `plan`, for pictures.

    `constraints` are those that the plan was made under.

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
    plain = best_uncompressed(trace, make_menu(trace, costs, constraints))
    return {
        "DeepSpeed": stock_timeline(trace, costs),
        "uncompressed, overlapped": simulate(plain, trace, costs),
        "planned": simulate(units_of(plan, trace), trace, costs),
    }


def units_of(plan: Plan, trace: ModelTrace) -> list[Unit]:
    """The units of a plan whose tensors are those of `trace`, in its order."""
    units, start = [], 0
    for group in plan.units():
        unit = Unit.of(trace, start, start + len(group), Option.parse(group[0].option), group[0].codec)
        units.append(replace(unit, chunk_numel=group[0].chunk_numel))
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
    pieces = (piece for unit in units for piece in unit.pieces(costs.world))
    return round(sum(costs.walk(piece.option, piece.numel, piece.codec).sent_bytes for piece in pieces))

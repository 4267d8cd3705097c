"""One model over 1 to 128 nodes: step times and traffic of DeepSpeed, the paper's baselines and our plan, at every point.

The curve is `espresso what-if --nodes`: a cluster of the testbed's size, rescaled, with a plan made anew for every number of
nodes. Beside the plan stand the baselines in the same timeline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from espresso_ds.commands.what_if import planner
from espresso_ds.core.config import EspressoBlock
from espresso_ds.core.profile import ClusterProfile, CompressorProfile, ModelTrace
from espresso_ds.planner.baselines import BASELINES
from espresso_ds.planner.build import in_wire_order, make_menu
from espresso_ds.planner.cost import Costs
from espresso_ds.planner.timeline import Unit, iteration_time
from espresso_ds.planner.what_if import doublings, what_if

NODES = doublings(1, 128)
FASTEST = EspressoBlock(thrift=0)
"""Plans give nothing of their speed for sending tensors uncompressed: baselines don't either."""

Change = Callable[[ClusterProfile], ClusterProfile]


def curve(
    trace: ModelTrace,
    cluster: ClusterProfile,
    compressors: CompressorProfile,
    nodes: Sequence[int],
    change: Change = lambda cluster: cluster,
) -> dict[str, Any]:
    """Predict along the numbers of nodes.

    Args:
        trace: of one rank; more ranks handle more samples per step (weak scaling).
        cluster: what the larger and smaller ones are rescaled from.
        compressors: one codec on GPU and CPU.
        nodes: how many.
        change: done to every cluster after rescaling.

    Returns:
        `points`, one for each number of nodes, and `answers` in words: up to how many nodes do things hold?
    """
    points: list[dict[str, Any]] = []
    plan_for = planner(trace, compressors, FASTEST, flat=False)

    def timed(rescaled: ClusterProfile):
        there = change(rescaled)
        predicted = plan_for(there)
        world = {"world_size": there.world_size, "ranks_per_node": there.ranks_per_node}
        points.append(
            {
                "nodes": there.nodes,
                "ranks": there.world_size,
                **predicted.model_dump(),
                "baselines": baselines(trace.model_copy(update=world), there, compressors),
            }
        )
        return predicted

    found = what_if(cluster, "nodes", [float(n) for n in nodes], timed, model=trace.model)
    return {"points": points, "answers": [answer.words for answer in found.answers]}


def baselines(trace: ModelTrace, cluster: ClusterProfile, compressors: CompressorProfile) -> dict[str, dict[str, float]]:
    """Seconds of a step, and bytes that one rank sends in it, of each baseline.

    They compress only what goes between nodes, so on one node all of them are FP32.
    """
    costs = Costs(cluster, compressors, trace.wire_dtype)
    trace = in_wire_order(trace)
    menu = make_menu(trace, costs)
    plans = {name: BASELINES[name if cluster.nodes > 1 else "FP32"](trace, menu) for name in BASELINES}
    return {name: {"s": iteration_time(units, trace, costs), "bytes": _sent(units, costs)} for name, units in plans.items()}


def _sent(units: Sequence[Unit], costs: Costs) -> float:
    return sum(costs.walk(unit.option, unit.numel, unit.codec).sent_bytes for unit in units)

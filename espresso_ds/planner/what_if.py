"""What would another network, or another number of nodes, give? The step predicted along a curve, and where it crosses a line.

Every point is the cluster as measured, rescaled by `routine_models`, with a plan made anew for it. Compute times and codec times
of a rank stay as measured, so more nodes mean more samples per step (weak scaling); what rescaling assumes is said there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from ..core.errors import FileError
from ..core.option import Level
from ..core.people import people_bit_per_s
from ..core.plan import Prediction
from ..core.profile import ClusterProfile
from ..core.record import Record
from .routine_models import rescaled

Axis = Literal["bandwidth", "nodes"]
PlanFor = Callable[[ClusterProfile], Prediction]
"""Makes a plan for a cluster and says what it predicts."""


class Point(Record):
    """One cluster of a curve, and what training on it is predicted to take."""

    nodes: PositiveInt
    ranks: PositiveInt
    inter_speed: PositiveFloat = Field(description="bandwidth between nodes over the measured one")
    inter_bit_per_s: PositiveFloat | None = Field(description="the same in bit/s; none where no link between nodes was measured")
    predicted: Prediction


class Answer(Record):
    """From where on, or up to where, something holds along the curve."""

    what: str
    holds: Literal["never", "everywhere", "from", "up to"]
    at: NonNegativeFloat | None = Field(description="inter_speed or nodes, between points on a straight line over the logarithm")
    words: str


class WhatIf(Record):
    """A curve over the bandwidth between nodes or over the number of nodes, ascending, with its answers."""

    model: str
    backend: str
    nodes: PositiveInt = Field(description="as measured")
    ranks_per_node: PositiveInt
    axis: Axis
    target: float = Field(gt=0, lt=1, description="share of the compute-only speed that is asked for")
    worth: float = Field(gt=0, lt=1, description="share of the step that compression must save to be worthwhile")
    points: tuple[Point, ...] = Field(min_length=1)
    answers: tuple[Answer, ...]


def what_if(
    cluster: ClusterProfile,
    axis: Axis,
    values: Sequence[float],
    plan_for: PlanFor,
    *,
    model: str,
    target: float = 0.95,
    worth: float = 0.01,
    progress: Callable[[float, str], None] = lambda share, what: None,
) -> WhatIf:
    """Predict along a curve and answer.

    Args:
        cluster: as measured.
        axis: what varies.
        values: its values, in any order: bandwidth over the measured one, or numbers of nodes.
        plan_for: called once for every value.
        model: name, for people.
        target: share of the compute-only speed that is asked for.
        worth: share of the uncompressed, overlapped step that compression must save to be worthwhile.
        progress: told the share done and what is being planned.

    Raises:
        FileError: there is no value or one that is not positive, target or worth is not between 0 and 1, or the profile cannot be
            rescaled; and whatever `plan_for` raises.
    """
    for name, share in (("target", target), ("worth", worth)):
        if not 0 < share < 1:
            raise FileError(f"what-if: {name} is {share!r}; give a share between 0 and 1")
    if axis == "bandwidth" and cluster.nodes == 1:
        raise FileError(
            f"the cluster profile is of one node, {cluster.hosts[0]}, and no bandwidth between nodes matters to it; "
            f"measure two nodes or more with `{ClusterProfile.MADE_BY}`"
        )
    points = []
    for number, value in enumerate(values := sorted(set(values))):
        progress(number / len(values), f"planning for {value:.4g} x the bandwidth" if axis == "bandwidth" else f"{value:g} nodes")
        points.append(_point(cluster, axis, value, plan_for))
    found = WhatIf.read(
        {
            "model": model,
            "backend": cluster.backend,
            "nodes": cluster.nodes,
            "ranks_per_node": cluster.ranks_per_node,
            "axis": axis,
            "target": target,
            "worth": worth,
            "points": points,
            "answers": (),
        },
        "what-if",
    )
    return found.model_copy(update={"answers": _answers(found)})


def geometric(low: float, high: float, count: int) -> list[float]:
    """`count` values from `low` to `high`, each larger by the same factor; the measured one, 1, among them if in between."""
    if not 0 < low <= high < math.inf or count < 2:
        raise FileError(f"no {count} values go from {low!r} to {high!r}; give a range of positive numbers, such as 0.01..10")
    values = [low * (high / low) ** (number / (count - 1)) for number in range(count - 1)] + [high]
    return sorted({*values, *([1.0] if low < 1 < high else [])})


def doublings(low: int, high: int) -> list[int]:
    """Powers of two from `low` to `high`, and both ends."""
    if not 1 <= low <= high:
        raise FileError(f"no numbers of nodes go from {low!r} to {high!r}; give a range of positive ones, such as 1..1024")
    return sorted({low, high, *(1 << bit for bit in range(low.bit_length(), high.bit_length()))})


def inter_bit_per_s(cluster: ClusterProfile) -> float | None:
    """Bandwidth of the measured link between nodes, if its time per byte was measurable."""
    link = cluster.links.get(Level.INTER)
    return 8 / link.beta_s_per_byte if link is not None and link.beta_s_per_byte else None


def _point(cluster: ClusterProfile, axis: Axis, value: float, plan_for: PlanFor) -> Point:
    changed = rescaled(cluster, inter_speed=value) if axis == "bandwidth" else rescaled(cluster, nodes=int(value))
    return Point(
        nodes=changed.nodes,
        ranks=changed.world_size,
        inter_speed=value if axis == "bandwidth" else 1.0,
        inter_bit_per_s=inter_bit_per_s(changed),
        predicted=plan_for(changed),
    )


def _answers(found: WhatIf) -> tuple[Answer, ...]:
    """Which bandwidth is needed, or how many nodes can be used; and where compression pays."""
    rises = found.axis == "bandwidth"  # better links help, more nodes do not
    asked = {
        "DeepSpeed as it is": [point.predicted.stock_s for point in found.points],
        "overlap alone": [point.predicted.uncompressed_s for point in found.points],
        "the plan": [point.predicted.planned_s for point in found.points],
    }
    answers = [
        _answer(
            found,
            f"{way} {'reaches' if rises else 'keeps'} {found.target:.0%} of the compute-only speed",
            [point.predicted.compute_s / s - found.target for point, s in zip(found.points, seconds, strict=True)],
            onwards=rises,
        )
        for way, seconds in asked.items()
    ]
    saved = [1 - point.predicted.planned_s / point.predicted.uncompressed_s for point in found.points]
    what = f"compression saves {100 * found.worth:.3g}% of the step or more over overlap alone"
    answers.append(_answer(found, what, [share - found.worth for share in saved], onwards=not rises))
    return tuple(answers)


def _answer(found: WhatIf, what: str, margins: Sequence[float], onwards: bool) -> Answer:
    """Where `margins`, one for each point, are not negative: to the curve's upper end if `onwards`, else from its lower one."""
    walk = list(zip([_place(found.axis, point) for point in found.points], margins, strict=True))
    if onwards:
        walk.reverse()  # start at the end where it should hold
    held = next((number for number, (_, margin) in enumerate(walk) if margin < 0), len(walk))
    (near, _), (far, _) = walk[0], walk[-1]
    if held == 0:
        return Answer(what=what, holds="never", at=None, words=f"{what}: not even at {_named(found, near)}")
    if held == len(walk):
        return Answer(what=what, holds="everywhere", at=None, words=f"{what}: even at {_named(found, far)}")
    (inside, above), (outside, below) = walk[held - 1], walk[held]
    at = inside * (outside / inside) ** (above / (above - below))
    if found.axis == "nodes":
        at = float(math.ceil(at) if onwards else math.floor(at))
    words = f"{what}: {'from' if onwards else 'up to'} about {_named(found, at)}{' on' if onwards else ''}"
    return Answer(what=what, holds="from" if onwards else "up to", at=at, words=words)


def _place(axis: Axis, point: Point) -> float:
    return point.inter_speed if axis == "bandwidth" else float(point.nodes)


def _named(found: WhatIf, at: float) -> str:
    """A place on the axis for people."""
    if found.axis == "nodes":
        return f"{at:.0f} node{'s' if at != 1 else ''} ({at * found.ranks_per_node:.0f} ranks)"
    rate, speed = found.points[0].inter_bit_per_s, found.points[0].inter_speed
    return f"{people_bit_per_s(rate / speed * at)} ({at:.3g} x measured)" if rate else f"{at:.3g} x the measured bandwidth"

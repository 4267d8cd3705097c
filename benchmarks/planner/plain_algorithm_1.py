"""Algorithm 1 as one would write it down: the peer that the planner's time is compared with.

Plain Python, the whole timeline for every candidate, no lower bounds, no native code. Larger models would take many minutes:
they are given LIMIT_S, and the rest is extrapolated. What a candidate takes grows a little as more tensors are compressed, since
such options have more steps; but Property 1 may rule out some of the tensors that are counted as left. Plans are compared where
plain Algorithm 1 came to its end.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from rich.progress import track
from rich.table import Table

from espresso_ds.core.option import Device, Option
from espresso_ds.core.profile import ModelTrace
from espresso_ds.planner.baselines import fp32
from espresso_ds.planner.cost import Costs
from espresso_ds.planner.limits import Limits
from espresso_ds.planner.search import best_plan, published
from espresso_ds.planner.timeline import Unit, iteration_time, simulate
from espresso_ds.planner.tree import option_tree

from .testbeds import MODELS, TESTBEDS, Case, menu_of, trace_of

CODEC = "randomk"
LIMIT_S = 10.0


class Plain(NamedTuple):
    """What plain Algorithm 1 gave, as far as it came."""

    units: list[Unit]
    seconds: float
    done: int  # candidates that were tried
    left: int  # candidates of the tensors that were not yet looked at


def plain_algorithm_1(
    units: Sequence[Unit], options: Sequence[Option], trace: ModelTrace, costs: Costs, limit_s: float = float("inf")
) -> Plain:
    """E's Algorithm 1 from `units`, which compress nothing; it stops after `limit_s` seconds."""
    plan, done, began = list(units), 0, time.perf_counter()
    best_s, hidden = iteration_time(plan, trace, costs), simulate(plan, trace, costs).hidden
    order = sorted(range(len(plan)), key=lambda index: (-plan[index].numel, -index))
    for number, index in enumerate(order):
        if index in hidden:
            continue
        if time.perf_counter() - began > limit_s:
            ahead = sum(other not in hidden for other in order[number:])
            return Plain(plan, time.perf_counter() - began, done, ahead * len(options))
        best = plan[index]
        for option in options:
            plan[index] = replace(plan[index], option=option)
            trial_s = iteration_time(plan, trace, costs)
            if trial_s < best_s:
                best, best_s = plan[index], trial_s
        done += len(options)
        plan[index] = best
        hidden = simulate(plan, trace, costs).hidden
    return Plain(plan, time.perf_counter() - began, done, 0)


def run() -> dict[str, Any]:
    """Time it beside the planner on every model and testbed with one codec."""
    options, rows = option_tree((Device.GPU,)), []
    for testbed in TESTBEDS:
        for model in track(MODELS, f"plain Algorithm 1, {testbed}"):
            trace, menu = trace_of(model, testbed), menu_of(Case(model, testbed, CODEC))
            began = time.perf_counter()
            by_algorithms_s = iteration_time(published(trace, menu, Limits(trace, menu)).units, trace, menu.costs)
            published_s = time.perf_counter() - began
            began = time.perf_counter()
            planned_s = iteration_time(best_plan(trace, menu), trace, menu.costs)
            planner_s = time.perf_counter() - began
            plain = plain_algorithm_1(fp32(trace, menu), options, trace, menu.costs, LIMIT_S)
            plain_s = plain.seconds * (1 + plain.left / plain.done)
            rows.append(
                {
                    "model": model,
                    "testbed": testbed,
                    "planner_s": planner_s,
                    "published_s": published_s,
                    "published_planned_s": by_algorithms_s,
                    "plain_s": plain_s,
                    "extrapolated": plain.left > 0,
                    "planned_s": planned_s,
                    "plain_planned_s": None if plain.left else iteration_time(plain.units, trace, menu.costs),
                }
            )
    return {"codec": CODEC, "rows": rows, "least_ratio": min(row["plain_s"] / row["planner_s"] for row in rows)}


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """One row for each model and testbed."""
    table = Table(title=f"Plain Python Algorithm 1, {result['codec']} (~: extrapolated)", title_justify="left")
    for column in ("testbed", "model", "planner", "its Algorithms 1 + 2", "plain", "plain / planner", "steps of the three, ms"):
        table.add_column(column, justify="left" if column in ("testbed", "model") else "right")
    for row in result["rows"]:
        other = row["plain_planned_s"]
        table.add_row(
            row["testbed"],
            row["model"],
            f"{row['planner_s'] * 1e3:.0f} ms",
            f"{row['published_s'] * 1e3:.0f} ms",
            f"{'~' if row['extrapolated'] else ''}{row['plain_s']:.1f} s",
            f"{row['plain_s'] / row['planner_s']:.0f}",
            ", ".join("?" if s is None else f"{s * 1e3:.2f}" for s in (row["planned_s"], row["published_planned_s"], other)),
        )
    yield table

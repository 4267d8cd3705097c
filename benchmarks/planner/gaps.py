"""How far from the optimum the plans of the paper's models can be: plan, bound and certified gap of every case."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

from rich.progress import track
from rich.table import Table

from espresso_ds.planner.limits import Limits
from espresso_ds.planner.search import best_plan, certified_plan
from espresso_ds.planner.timeline import iteration_time

from .testbeds import ALL, menu_of, trace_of


def run() -> dict[str, Any]:
    """Plan and bound all cases."""
    rows = []
    for case in track(ALL, "gaps"):
        trace, menu = trace_of(case.model, case.testbed), menu_of(case)
        quick_s = iteration_time(best_plan(trace, menu), trace, menu.costs)
        began = time.perf_counter()
        units, bound = certified_plan(trace, menu, Limits(trace, menu))
        took_s = time.perf_counter() - began
        planned_s, bound_s = iteration_time(units, trace, menu.costs), bound.seconds
        assert trace.compute_s * (1 - 1e-9) <= bound_s <= planned_s * (1 + 1e-9), f"{case}: bound {bound_s}, plan {planned_s}"
        times = {"planned_s": planned_s, "bound_s": bound_s, "compute_s": trace.compute_s, "quick_s": quick_s, "took_s": took_s}
        rows.append({**case._asdict(), **times, "limit": bound.limit})
    gaps = [row["planned_s"] / row["bound_s"] - 1 for row in rows]
    return {"rows": rows, "median_gap": statistics.median(gaps), "worst_gap": max(gaps)}


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """One row for each case."""
    title = f"Certified gaps: median {result['median_gap']:.2%}, worst {result['worst_gap']:.2%}"
    table = Table(title=title, title_justify="left")
    for column in ("testbed", "model", "codec", "plan, ms", "bound, ms", "gap", "quick plan, ms", "all took, ms"):
        table.add_column(column, justify="right" if column in ("gap",) or "ms" in column else "left")
    for row in result["rows"]:
        planned, bound, quick, took = (row[key] * 1e3 for key in ("planned_s", "bound_s", "quick_s", "took_s"))
        cells = (f"{planned:.2f}", f"{bound:.2f}", f"{planned / bound - 1:.2%}", f"{quick:.2f}", f"{took:.0f}")
        table.add_row(row["testbed"], row["model"], row["codec"], *cells)
    yield table

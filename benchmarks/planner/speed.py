"""How long planning takes: evaluations per second, plans of the paper's models, and growth up to 10,000 tensors.

Times are medians of REPEATS in one process on one thread, from profiles in memory, each with a menu of its own: "menu" is to look
up what the 4341 options' operations cost, "search" is the plan. The tree itself, made once for a cluster's shape, is timed apart.
The paper's times are of its own search on its own machine. To compare machines and days, each is also given in units of a fixed
piece of work, plain Python arithmetic, timed between the repeats.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from multiprocessing import get_context
from statistics import median
from typing import Any

from rich.progress import track
from rich.table import Table

from espresso_ds.planner.baselines import byteps_compress
from espresso_ds.planner.cost import Shape, operations
from espresso_ds.planner.player import player
from espresso_ds.planner.search import best_plan
from espresso_ds.planner.tree import option_tree

from .testbeds import ALL, Case, catalogue, menu_of, mixture_of_experts, trace_of

REPEATS = 5
PAPER_MS = {"vgg16": 17, "resnet101": 179, "bert": 125, "gpt2": 99}
"""E's table of times to select the strategy."""
GROWTH = (1_250, 2_500, 5_000, 10_000)
GROWTH_CASE = Case("resnet101", "v100-pcie-25g", "randomk")


def fixed_work() -> float:
    """Seconds of the fixed piece of work."""
    began = time.perf_counter()
    sum(number * number for number in range(200_000))
    return time.perf_counter() - began


def run() -> dict[str, Any]:
    """Measure all three."""
    return {
        "tree_s": tree_time(),
        "evaluations_per_s": evaluations(),
        "plans": [plan_time(case) for case in track(ALL, "plan times")],
        "growth": [fresh(count) for count in track((None, *GROWTH), "growth")],
    }


def tree_time() -> float:
    """Median seconds to make the tree and to follow its options over 8 nodes of 8 GPUs."""
    times = []
    for _ in range(REPEATS):
        for cached in (option_tree, operations, catalogue):
            cached.cache_clear()
        began = time.perf_counter()
        catalogue(Shape(8, 8))
        times.append(time.perf_counter() - began)
    return median(times)


def evaluations() -> dict[str, float]:
    """Step times per second for ResNet101's 314 tensors: with one changed, from that one on, and played in full."""
    trace, menu = trace_of(GROWTH_CASE.model, GROWTH_CASE.testbed), menu_of(GROWTH_CASE)
    plan = player([tensor.ready_s for tensor in trace.tensors], trace.backward_s, menu)
    units = byteps_compress(trace, menu)
    choices = [menu.choices.index((unit.option, unit.codec)) for unit in units]
    for place, (unit, choice) in enumerate(zip(units, choices, strict=True)):
        plan.set(place, unit.numel, choice)
    plan.end()
    rates: dict[str, list[float]] = {"one unit changed": [], "in full": []}
    for _ in range(REPEATS):
        began = time.perf_counter()
        for place, (unit, choice) in enumerate(zip(units, choices, strict=True)):
            plan.attempt([(place, unit.numel, choice)])
        rates["one unit changed"].append(len(units) / (time.perf_counter() - began))
        began = time.perf_counter()
        for _ in range(50):
            plan.set(0, units[0].numel, choices[0])
            plan.end()
        rates["in full"].append(50 / (time.perf_counter() - began))
    return {name: median(found) for name, found in rates.items()}


def plan_time(case: Case) -> dict[str, Any]:
    """Median seconds of one case."""
    trace = trace_of(case.model, case.testbed)
    menus, searches, works = [], [], []
    for _ in range(REPEATS):
        works.append(fixed_work())
        began = time.perf_counter()
        menu = menu_of(case)
        ready = time.perf_counter()
        best_plan(trace, menu)
        menus.append(ready - began)
        searches.append(time.perf_counter() - ready)
    return {
        **case._asdict(),
        "menu_s": median(menus),
        "search_s": median(searches),
        "fixed_work_s": median(works),
        "paper_s": PAPER_MS[case.model] / 1e3,
    }


def fresh(tensors: int | None) -> dict[str, Any]:
    """`grown` in a process of its own, so that its peak memory is that of this plan."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(grown, (tensors,))


def grown(tensors: int | None) -> dict[str, Any]:
    """Seconds and bytes of ResNet101's plan, or of a mixture of experts of so many tensors."""
    trace = (
        trace_of(GROWTH_CASE.model, GROWTH_CASE.testbed) if tensors is None else mixture_of_experts(tensors, GROWTH_CASE.testbed)
    )
    menu = menu_of(GROWTH_CASE)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    units = best_plan(trace, menu)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "model": trace.model,
        "tensors": len(trace.tensors),
        "units": len(units),
        "search_s": seconds,
        "peak_bytes": peak * 1024,
        "search_bytes": (peak - before) * 1024,
    }


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """Plan times, then growth."""
    rates = ", ".join(f"{rate:,.0f} {name}" for name, rate in result["evaluations_per_s"].items())
    table = Table(title=f"Plan times; tree {result['tree_s'] * 1e3:.0f} ms; {rates} a second", title_justify="left")
    for column in (
        "testbed",
        "model",
        "codec",
        "menu, ms",
        "search, ms",
        "paper's, ms",
        "search / paper's",
        "search / fixed work",
    ):
        table.add_column(column, justify="left" if column in ("testbed", "model", "codec") else "right")
    for row in result["plans"]:
        menu, search, paper, work = (row[f"{key}_s"] for key in ("menu", "search", "paper", "fixed_work"))
        times = (f"{seconds * 1e3:.0f}" for seconds in (menu, search, paper))
        table.add_row(row["testbed"], row["model"], row["codec"], *times, f"{search / paper:.2f}", f"{search / work:.1f}")
    yield table
    table = Table(title="Growth", title_justify="left")
    for column in ("model", "tensors", "units", "search, s", "times ResNet101", "peak, MB", "of which for the search, MB"):
        table.add_column(column, justify="left" if column == "model" else "right")
    least = result["growth"][0]["search_s"]
    for row in result["growth"]:
        sizes = (f"{row[key] / 1e6:.0f}" for key in ("peak_bytes", "search_bytes"))
        cells = (f"{row['tensors']:,}", f"{row['units']:,}", f"{row['search_s']:.2f}", f"{row['search_s'] / least:.1f}")
        table.add_row(row["model"], *cells, *sizes)
    yield table

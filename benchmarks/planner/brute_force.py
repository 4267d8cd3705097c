"""How often the search finds the optimum: random small instances against the best of all their plans.

Every tensor is a unit of its own in all of them, since the optimum over fused units is another question. A plan is optimal if no
plan is faster by more than SAME of its step time. Where that takes too long to prove, it is only shown that none is faster by
NEAR; such an instance counts in "within 1%" alone. The first ENUMERATED instances of six tensors are cut to three and also solved
by trying all plans in the reference timeline, without any bound.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

from rich.progress import track
from rich.table import Table

from espresso_ds.planner.limits import Limits
from espresso_ds.planner.search import best_plan, published
from espresso_ds.planner.timeline import Unit, iteration_time

from .exact import BUDGET, library, optimum
from .random_cases import KINDS, random_case

SAME, NEAR = 1e-6, 0.01
INSTANCES = {"3 tensors, full tree": 300, "6 tensors, reduced tree": 700}
ENUMERATED = 10
PROCESSES = 2
WAYS = ("published", "planned")


def run() -> dict[str, Any]:
    """Solve all instances and enumerate a few."""
    library()
    results = {}
    with ProcessPoolExecutor(PROCESSES, mp_context=get_context("fork")) as pool:
        for name, count in INSTANCES.items():
            rows = track(pool.map(partial(solve, name), range(count), chunksize=5), name, total=count)
            results[name] = summary(list(rows))
        checked = list(pool.map(enumerated, range(ENUMERATED)))
    return {"kinds": results, "enumerated": len(checked), "largest_difference": max(checked)}


def solve(kind: str, seed: int) -> dict[str, float]:
    """F(S) in seconds of both searches and of the fastest plan known, and a proven lower bound of all plans."""
    trace, menu = random_case(KINDS[kind], seed)
    by_algorithms = iteration_time(published(trace, menu, Limits(trace, menu)).units, trace, menu.costs)
    planned = iteration_time(best_plan(trace, menu, fused=False), trace, menu.costs)
    best = optimum(trace, menu, min(by_algorithms, planned) * (1 - SAME / 10))
    bound_s = best.time_s
    if not best.proven:
        nearly = optimum(trace, menu, best.time_s / (1 + NEAR), budget=4 * BUDGET)
        bound_s = nearly.time_s if nearly.proven else 0.0
    if best.units is not None:
        again = iteration_time(best.units, trace, menu.costs)
        assert abs(again / best.time_s - 1) < 1e-9, f"{kind}, seed {seed}: {again} by the reference, {best.time_s} natively"
    return {
        "seed": seed,
        "published": by_algorithms,
        "planned": planned,
        "fastest": best.time_s,
        "bound": bound_s,
        "proven": best.proven,
    }


def summary(rows: list[dict[str, float]]) -> dict[str, Any]:
    """What the instances come to. "optimal" is a share of those whose optimum is proven, "within 1%" of all."""
    proven = [row for row in rows if row["proven"]]
    found: dict[str, Any] = {"instances": len(rows), "proven": len(proven)}
    for way in WAYS:
        excess = sorted((row[way] / row["fastest"] - 1, row["seed"]) for row in rows)
        found[way] = {
            "optimal": statistics.mean(row[way] <= row["fastest"] * (1 + SAME) for row in proven),
            "within_1_percent": statistics.mean(row[way] <= row["bound"] * (1 + NEAR) * (1 + SAME) for row in rows),
            "worst": excess[-1][0],
            "worst_seeds": [seed for share, seed in excess[::-1][:10] if share > NEAR],
        }
    return found


def enumerated(seed: int) -> float:
    """Relative difference between the optimum by exact.cpp and by trying every plan in the reference timeline."""
    trace, menu = random_case(KINDS["6 tensors, reduced tree"]._replace(tensors=3), seed)
    tensors = range(len(trace.tensors))
    plans = itertools.product(*([Unit.of(trace, i, i + 1, *choice) for choice in menu.choices] for i in tensors))
    least = min(iteration_time(plan, trace, menu.costs) for plan in plans)
    return abs(optimum(trace, menu, float("inf")).time_s / least - 1)


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """One row for each kind and search."""
    table = Table(title="Against the optimum, single-tensor units", title_justify="left")
    for column in ("instances", "search", "proven", "optimal", "within 1%", "worst seen"):
        table.add_column(column, justify="left" if column in ("instances", "search") else "right")
    for kind, found in result["kinds"].items():
        for way in WAYS:
            shares = (f"{found[way][key]:.1%}" for key in ("optimal", "within_1_percent", "worst"))
            table.add_row(kind, way, f"{found['proven']} of {found['instances']}", *shares)
    yield table

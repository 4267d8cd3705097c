"""Do the routine models extrapolate? Small emulated clusters predict larger ones, which are then measured as well.

Each cluster is profiled REPEATS times, all of them interleaved, and the medians are kept. Every emulated host shares this
machine's cores with the others, which no real node does, and the models assume that every node brings its own. So there are two
kinds of comparison: with all cores in both clusters, where larger clusters have less of a core per rank; and with half the cores
for the smaller cluster of half the ranks, where a rank has the same share of a core in both.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from rich.progress import track
from rich.table import Table

from espresso_ds.core.option import Task
from espresso_ds.core.profile import ClusterProfile, RoutineCost
from espresso_ds.planner.curves import routine_curve
from espresso_ds.planner.routine_models import rescaled
from espresso_ds.profiler.fit import fit_line

ROOT = Path(__file__).resolve().parents[2]
RATE, REPEATS, TIMEOUT_S = "200mbit", 3, 300
FACTOR = 1.2
"""A median further off than this, up or down, is called out."""


class Emulated(NamedTuple):
    """A cluster of emulated hosts of so many ranks each, on so many of this machine's cores."""

    hosts: int
    slots: int
    cores: int

    def __str__(self) -> str:
        return f"{self.hosts} x {self.slots} on {self.cores} core{'s' if self.cores > 1 else ''}"


def comparisons(cores: int) -> dict[str, list[tuple[Emulated, Emulated]]]:
    """Which cluster predicts which, on a machine of so many cores."""
    small, half = Emulated(2, 1, cores), max(1, cores // 2)
    return {
        "all cores in both": [(small, Emulated(4, 1, cores)), (small, Emulated(8, 1, cores))],
        "as much of a core per rank": [
            (Emulated(2, 1, half), Emulated(4, 1, cores)),
            (Emulated(4, 1, half), Emulated(8, 1, cores)),
            (Emulated(2, 2, half), Emulated(4, 2, cores)),
        ],
    }


def run() -> dict[str, Any]:
    """Profile all clusters and compare. Raises RuntimeError where hosts cannot be emulated or measured."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    pairs, load = comparisons(len(cores)), os.getloadavg()[0]
    clusters = sorted({cluster for found in pairs.values() for pair in found for cluster in pair})
    taken: dict[Emulated, list[ClusterProfile]] = {cluster: [] for cluster in clusters}
    for _ in range(REPEATS):
        for cluster in track(clusters, f"emulated clusters at {RATE}"):
            taken[cluster].append(profile(cluster, cores[: cluster.cores]))
    kept = {cluster: medians(profiles) for cluster, profiles in taken.items()}
    rows = [
        {"kind": kind, "from": str(small), "to": str(large), **compare(kept[small], kept[large])}
        for kind, found in pairs.items()
        for small, large in found
    ]
    return {
        "rate": RATE,
        "repeats": REPEATS,
        "load_average": load,
        "rows": rows,
        "profiles": {str(c): _samples(kept[c]) for c in clusters},
    }


def profile(cluster: Emulated, cores: Sequence[int]) -> ClusterProfile:
    """One quick profile over gloo of an emulated cluster whose processes run on these cores. Raises RuntimeError."""
    mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if mpirun is None:
        raise RuntimeError('no mpirun found; install it with `pip install ".[mpi]"`')
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "cluster.json")
        rank = [sys.executable, "-m", "espresso_ds.profiler.cluster", "-o", out, "--quick", "--backend", "gloo", "--threads", "1"]
        ranks = ["-n", cluster.hosts * cluster.slots, "--map-by", "slot", "--bind-to", "none", "--allow-run-as-root"]
        hosts = ["--hosts", cluster.hosts, "--slots", cluster.slots, "--rate", RATE, "--"]
        command = [sys.executable, ROOT / "launch/emulate", *hosts, mpirun, "--hostfile", "{hostfile}", *ranks]
        command += ["-x", "PYTHONPATH", "-x", "OMP_NUM_THREADS", *rank]
        done = subprocess.run(
            list(map(str, command)),
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        if done.returncode:
            raise RuntimeError(f"{cluster}: exit status {done.returncode}: {(done.stderr or done.stdout)[-2000:]}")
        return ClusterProfile.load(out)


def medians(profiles: Sequence[ClusterProfile]) -> ClusterProfile:
    """The first profile with the medians of all, at the sizes that most of them measured, and lines through those."""
    first = profiles[0]
    links = {level: min((p.links[level] for p in profiles), key=lambda link: link.fit_error) for level in first.links}
    costs = (_median_cost(costs) for costs in zip(*(p.routines for p in profiles), strict=True))
    return first.model_copy(update={"routines": tuple(costs), "links": links})


def _median_cost(costs: Sequence[RoutineCost]) -> RoutineCost:
    times = [dict(zip(cost.nbytes, cost.seconds, strict=True)) for cost in costs]
    found = sorted({nbytes for cost in costs for nbytes in cost.nbytes})
    sizes = [nbytes for nbytes in found if 2 * sum(nbytes in each for each in times) > len(times)]
    seconds = [median(each[nbytes] for each in times if nbytes in each) for nbytes in sizes]
    return costs[0].model_copy(update={"nbytes": tuple(sizes), "seconds": tuple(seconds), **fit_line(sizes, seconds)._asdict()})


def compare(small: ClusterProfile, large: ClusterProfile) -> dict[str, Any]:
    """Predicted and measured seconds of the larger cluster, the first as rescaled from the smaller one.

    At every size that both measured or that lies between those of the smaller one: more nodes are the question, not more bytes.
    """
    predicted = rescaled(small, nodes=large.nodes)
    ratios = []
    for guess, cost in zip(predicted.routines, large.routines, strict=True):
        assert (guess.routine, guess.level, guess.ranks, guess.groups) == (cost.routine, cost.level, cost.ranks, cost.groups)
        for nbytes, measured_s in zip(cost.nbytes, cost.seconds, strict=True):
            if nbytes > guess.nbytes[-1]:
                break
            predicted_s = float(routine_curve(guess)(nbytes))
            ratios.append(
                {
                    "routine": str(cost.routine),
                    "level": str(cost.level),
                    "groups": cost.groups,
                    "nbytes": nbytes,
                    "predicted_s": predicted_s,
                    "measured_s": measured_s,
                    "bandwidth": guess.beta_s_per_byte * nbytes > guess.alpha_s,
                }
            )
    return {"summary": summary(ratios), "ratios": ratios}


def summary(ratios: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Median and worst ratio of all, of the sizes where bandwidth or latency takes longer, and of every routine."""
    parts = {
        "all": ratios,
        "bandwidth": [row for row in ratios if row["bandwidth"]],
        "latency": [row for row in ratios if not row["bandwidth"]],
        **{str(task): [row for row in ratios if row["routine"] == task] for task in sorted(Task)},
        **{f"{task}, bandwidth": [r for r in ratios if r["routine"] == task and r["bandwidth"]] for task in sorted(Task)},
    }
    return {name: _median_and_worst(rows) for name, rows in parts.items() if rows}


def _median_and_worst(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    found = [row["predicted_s"] / row["measured_s"] for row in rows]
    return {"sizes": len(found), "median": median(found), "worst": max(found, key=lambda ratio: max(ratio, 1 / ratio))}


def _samples(profile: ClusterProfile) -> list[dict[str, Any]]:
    return [cost.model_dump(mode="json", exclude={"fit_error"}) for cost in profile.routines]


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """Median and worst ratio of each part, a column for each comparison."""
    rows = result["rows"]
    taken = f"{result['repeats']} profiles of each cluster, load average before them {result['load_average']:.1f}"
    title = f"Predicted over measured seconds at {result['rate']}: median (worst); * beyond {FACTOR:g} times; {taken}"
    table = Table(title=title, title_justify="left")
    table.add_column("sizes")
    for row in rows:
        table.add_column(f"{row['from']}\nto {row['to']}\n{row['kind']}", justify="right")
    for name in dict.fromkeys(name for row in rows for name in row["summary"]):
        cells = []
        for row in rows:
            found = row["summary"].get(name)
            far = found is not None and not 1 / FACTOR <= found["median"] <= FACTOR
            cells.append("" if found is None else f"{found['median']:.2f}{'*' if far else ''} ({found['worst']:.2f})")
        table.add_row(name, *cells)
    yield table

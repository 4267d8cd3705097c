"""The four public traces on both testbeds, from 8 to 1,024 GPUs and over several links between nodes.

Links: the testbed's own, 10, 25, 100 and 400 Gbit/s, each with the testbed's latency, which grows by the logarithm of the number
of ranks; and, on the paper's cases, two more. "effective": the rate at which FP32 has the scaling factor that the paper reports
for 64 GPUs (see benchmarks/planner/paper.py). "ring": the testbed's own link with latencies between nodes that grow in
proportion to the nodes, as round a ring, so that what rests on the logarithm can be seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple

from rich.progress import track
from rich.table import Table

from espresso_ds.core.option import Level
from espresso_ds.core.profile import ClusterProfile
from espresso_ds.planner.routine_models import nominal_cluster

from ..planner.paper import PAPER, effective_speed
from ..planner.testbeds import TESTBEDS, Case, cluster_of, compressors_of, load, trace_of
from .curves import NODES, curve

CODECS = {case.model: case.codec for case in PAPER}
GBIT_PER_S = (10.0, 25.0, 100.0, 400.0)
PROCESSES = 2
WAYS = {
    "DeepSpeed": "stock_s",
    "overlap": "uncompressed_s",
    "planned": "planned_s",
    "upper bound": "free_compression_s",
}
"""Fields of a point, by the names of what they are. The upper bound is E's: compression that takes no time."""


class Link(NamedTuple):
    """The links between nodes: what they are called, bandwidth over the testbed's, and whether latencies are a ring's."""

    name: str
    speed: float
    ring: bool = False


def links_of(case: Case) -> list[Link]:
    """All links of a case; the first is the testbed's own. Raises FileNotFoundError."""
    own = load("testbeds", case.testbed)["inter"]["gbit_per_s_per_node"]
    links = [Link(f"{rate:g} Gbit/s", rate / own) for rate in sorted(GBIT_PER_S, key=lambda rate: (rate != own, rate))]
    if case in PAPER:
        links.append(Link("ring", 1.0, ring=True))
    fitted = next((other for other, figures in PAPER.items() if other.testbed == case.testbed and figures.scaling), None)
    if case in PAPER and fitted is not None:
        mine = case if PAPER[case].scaling is not None else fitted
        links.append(Link("effective", effective_speed(mine, PAPER[mine].scaling or 1.0)))
    return links


def run() -> dict[str, Any]:
    """Predict all curves. Raises FileNotFoundError where the traces and testbeds are not there."""
    cases = [Case(model, testbed, codec) for testbed in TESTBEDS for model, codec in CODECS.items()]
    jobs = [(case, link) for case in cases for link in links_of(case)]
    with ProcessPoolExecutor(PROCESSES, mp_context=get_context("fork")) as pool:
        curves = list(track(pool.map(predict, jobs), "traces", total=len(jobs)))
    return {"nodes": NODES, "curves": curves}


def predict(job: tuple[Case, Link]) -> dict[str, Any]:
    """One curve, with its case and link."""
    case, link = job
    cluster = cluster_of(case.testbed, link.speed)
    change = ring_latencies if link.ring else lambda cluster: cluster
    found = curve(trace_of(case.model, case.testbed), cluster, compressors_of(case.testbed, case.codec), NODES, change)
    gbit_per_s = 8e-9 / cluster.links[Level.INTER].beta_s_per_byte
    own = link.speed == 1 and not link.ring
    return {**case._asdict(), "link": link.name, "own": own, "gbit_per_s": gbit_per_s, **found}


def ring_latencies(cluster: ClusterProfile, base: int = 8) -> ClusterProfile:
    """The nominal cluster of the same shape whose latency between nodes is that of `base` nodes times (n - 1) / (base - 1)."""
    if cluster.nodes == 1:
        return cluster
    intra, inter = cluster.links[Level.INTRA], cluster.links[Level.INTER]
    slow = inter.model_copy(update={"alpha_s": inter.alpha_s * (cluster.nodes - 1) / (base - 1)})
    return nominal_cluster(cluster.nodes, cluster.ranks_per_node, intra, slow, cluster.backend)


def of(result: dict[str, Any], **wanted: object) -> Iterator[dict[str, Any]]:
    """The curves whose fields are these."""
    return (found for found in result["curves"] if all(found[key] == value for key, value in wanted.items()))


def seconds(point: dict[str, Any]) -> dict[str, float]:
    """Step times of all ways at a point, in the order in which they are shown."""
    ways = {name: point[field] for name, field in WAYS.items()}
    others = {name: found["s"] for name, found in point["baselines"].items() if name != "FP32"}
    return {**{name: ways[name] for name in ("DeepSpeed", "overlap")}, **others, "planned": ways["planned"], **ways}


def efficiency(point: dict[str, Any], way: str) -> float:
    """Throughput over that of as many GPUs that need not talk."""
    return point["compute_s"] / seconds(point)[way]


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """Efficiency, step time and traffic on the testbeds' own links; then efficiency over all links."""
    ways = list(seconds(result["curves"][0]["points"][0]))
    owned = list(of(result, own=True))
    shown = (8, 64, 256, 1024)
    yield _table(
        "Scaling efficiency on the testbed's own link",
        ("GPUs", *ways),
        [
            (*_who(found), point["ranks"], *(f"{efficiency(point, way):.0%}" for way in ways))
            for found in owned
            for point in found["points"]
            if point["ranks"] in shown
        ],
    )
    yield _table(
        "Step time in ms, and MB that one GPU sends in it, on the testbed's own link",
        ("GPUs", "compute", *ways, "sent, FP32", "sent, planned"),
        [
            (
                *_who(found),
                point["ranks"],
                f"{point['compute_s'] * 1e3:.0f}",
                *(f"{s * 1e3:.0f}" for s in seconds(point).values()),
                f"{point['uncompressed_bytes'] / 1e6:.0f}",
                f"{point['planned_bytes'] / 1e6:.0f}",
            )
            for found in owned
            for point in found["points"]
            if point["ranks"] in shown
        ],
    )
    yield _table(
        "Scaling efficiency at 1,024 GPUs over the link between nodes: overlap alone, then planned",
        (*(f"{rate:g} Gbit/s" for rate in GBIT_PER_S), "own, ring latencies", "effective"),
        [_over_links(result, *key) for key in dict.fromkeys(_who(found) for found in result["curves"])],
    )


def _over_links(result: dict[str, Any], testbed: str, model: str) -> tuple[str, ...]:
    cells = []
    for name in (*(f"{rate:g} Gbit/s" for rate in GBIT_PER_S), "ring", "effective"):
        found = next(of(result, testbed=testbed, link=name, model=model.partition(" ")[0]), None)
        last = found["points"][-1] if found else None
        cells.append(f"{efficiency(last, 'overlap'):.0%}, {efficiency(last, 'planned'):.0%}" if last else "")
    return (testbed, model, *cells)


def _who(found: dict[str, Any]) -> tuple[str, str]:
    return found["testbed"], f"{found['model']} + {found['codec']}"


def _table(title: str, columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(("testbed", "model", *columns)):
        table.add_column(column, justify="left" if number < 2 else "right")
    for row in rows:
        table.add_row(*map(str, row))
    return table

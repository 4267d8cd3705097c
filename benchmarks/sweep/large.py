"""A 70B-parameter transformer from 8 to 1,024 GPUs: tensor parallelism inside nodes, planned data parallelism between them.

A data-parallel group has one GPU of every node, and the eight groups of a node use its card at once, all alike. Seen from one of
them the cluster is one rank per node with an eighth of the card's bandwidth, and so it is given to the planner: a flat group. The
node's CPUs are shared by its eight ranks in the same way. One node is one replica, with nothing to synchronise. Codec times
are those of the testbeds' V100, which is slower than the GPUs that such models are trained on.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from rich.progress import track
from rich.table import Table

from espresso_ds.core.profile import ClusterProfile, Link
from espresso_ds.planner.routine_models import nominal_cluster

from ..planner.testbeds import compressors_of
from .curves import curve
from .traces import GBIT_PER_S, PROCESSES, efficiency, seconds
from .transformer import LLAMA_2_70B, TRAINING, trace_of

TESTBED = "v100-nvlink-100g"
CODECS = ("efsignsgd", "randomk")
NODES = (2, 8, 32, 128)
"""Planning 723 tensors takes its time, and the curves are smooth."""
LATENCY_S, LATENCY_NODES = 150e-6, 8
"""The testbeds' latency of a routine, and between how many nodes."""
GROUPS = TRAINING.tensor_parallel


def run() -> dict[str, Any]:
    """Predict a curve for every link and codec. Raises FileNotFoundError without the testbed whose codec times are used."""
    jobs = [(codec, rate) for codec in CODECS for rate in GBIT_PER_S]
    with ProcessPoolExecutor(PROCESSES, mp_context=get_context("fork")) as pool:
        curves = list(track(pool.map(predict, jobs), LLAMA_2_70B.name, total=len(jobs)))
    trace = trace_of(LLAMA_2_70B, TRAINING, NODES[-1])
    return {
        "parameters": LLAMA_2_70B.parameters,
        "tensors": len(trace.tensors),
        "elements_per_gpu": sum(tensor.numel for tensor in trace.tensors),
        "tokens_per_replica": TRAINING.tokens,
        "flops_per_s": TRAINING.flops_per_s,
        "compute_s": trace.compute_s,
        "nodes": NODES,
        "curves": curves,
    }


def predict(job: tuple[str, float]) -> dict[str, Any]:
    """One curve with its codec and link."""
    codec, gbit_per_s = job
    trace = trace_of(LLAMA_2_70B, TRAINING, NODES[-1])
    found = curve(trace, group_of(gbit_per_s), compressors_of(TESTBED, codec), NODES)
    return {"model": LLAMA_2_70B.name, "codec": codec, "gbit_per_s": gbit_per_s, **found}


def group_of(gbit_per_s: float, nodes: int = LATENCY_NODES) -> ClusterProfile:
    """What one of the data-parallel groups sees of cards of so many Gbit/s, which all groups of a node use at once."""
    inter = Link(alpha_s=LATENCY_S, beta_s_per_byte=8e-9 / gbit_per_s * GROUPS, fit_error=0.0)
    return nominal_cluster(nodes, 1, inter, inter)


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """Efficiency of every way, then step times and traffic."""
    ways = list(seconds(result["curves"][0]["points"][0]))
    title = f"{LLAMA_2_70B.name}: scaling efficiency; computing alone takes {result['compute_s']:.2f} s a step"
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(("codec", "card", "GPUs", *ways, "step, planned", "sent, plain", "sent, planned")):
        table.add_column(column, justify="left" if number == 0 else "right")
    for found in result["curves"]:
        for point in found["points"]:
            table.add_row(
                found["codec"],
                f"{found['gbit_per_s']:g} Gbit/s",
                str(point["nodes"] * GROUPS),
                *(f"{efficiency(point, way):.0%}" for way in ways),
                f"{point['planned_s']:.2f} s",
                *(f"{point[key] / 1e9:.2f} GB" for key in ("uncompressed_bytes", "planned_bytes")),
            )
    yield table

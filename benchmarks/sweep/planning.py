"""How long planning takes as clusters grow: CPU seconds of `espresso what-if` for one point, which other load hardly changes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from rich.progress import track
from rich.table import Table

from espresso_ds.commands.what_if import planner
from espresso_ds.core.profile import ClusterProfile, CompressorProfile, ModelTrace
from espresso_ds.planner.routine_models import rescaled

from ..planner.testbeds import TESTBEDS, Case, cluster_of, compressors_of, trace_of
from . import large, transformer
from .curves import FASTEST
from .traces import CODECS

GPUS = (16, 64, 256, 1024)
GBIT_PER_S = 100.0
"""Of the large model's cards; the traces are planned for the testbeds' own links."""


def run() -> dict[str, Any]:
    """Time all plans, one after another. Raises FileNotFoundError where the traces and testbeds are not there."""
    rows = []
    cases = [Case(model, testbed, codec) for testbed in TESTBEDS for model, codec in CODECS.items()]
    for case in track(cases, "planning times of the traces"):
        given = trace_of(case.model, case.testbed), cluster_of(case.testbed), compressors_of(case.testbed, case.codec)
        rows.append({"case": str(case), "tensors": len(given[0].tensors), "cpu_s": [timed(*given, gpus // 8) for gpus in GPUS]})
    trace = transformer.trace_of(transformer.LLAMA_2_70B, transformer.TRAINING, large.LATENCY_NODES)
    for codec in track(large.CODECS, f"planning times of {trace.model}"):
        given = trace, large.group_of(GBIT_PER_S), compressors_of(large.TESTBED, codec)
        seconds = [timed(*given, gpus // large.GROUPS) for gpus in GPUS]
        rows.append({"case": f"{trace.model} + {codec}, {GBIT_PER_S:g} Gbit/s", "tensors": len(trace.tensors), "cpu_s": seconds})
    return {"gpus": GPUS, "rows": rows}


def timed(trace: ModelTrace, cluster: ClusterProfile, compressors: CompressorProfile, nodes: int) -> float:
    """CPU seconds of the plan for so many nodes."""
    there, plan_for = rescaled(cluster, nodes=nodes), planner(trace, compressors, FASTEST, flat=False)
    began = time.process_time()
    plan_for(there)
    return time.process_time() - began


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """A row for each model, a column for each number of GPUs."""
    table = Table(title="Planning, seconds of CPU", title_justify="left")
    for number, column in enumerate(("case", "tensors", *(f"{gpus:,} GPUs" for gpus in result["gpus"]))):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in result["rows"]:
        table.add_row(row["case"], str(row["tensors"]), *(f"{seconds:.2g}" for seconds in row["cpu_s"]))
    yield table

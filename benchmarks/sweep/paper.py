"""The sweep where the paper has figures as well: 64 GPUs of its testbeds.

Two links: the nominal one, and the effective one, at which FP32 is fitted to the scaling factor that the paper reports. What
other systems lose against the plan there is predicted, and compared in detail by `python -m benchmarks.planner --parts paper`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from ..planner.paper import PAPER
from . import traces

RANKS, WITHIN = 64, 0.10
"""The paper's GPUs, and how near to the upper bound it is in every case."""


def run_on(swept: dict[str, Any]) -> dict[str, Any]:
    """The sweep's points at RANKS beside the paper's figures. Raises StopIteration where the sweep lacks one."""
    rows = []
    for case, figures in PAPER.items():
        for link in ({"own": True}, {"link": "effective"}):
            found = next(traces.of(swept, **case._asdict(), **link))
            point = next(point for point in found["points"] if point["ranks"] == RANKS)
            planned_s, others = point["planned_s"], point["baselines"]
            rows.append(
                {
                    **case._asdict(),
                    "link": found["link"],
                    "gbit_per_s": found["gbit_per_s"],
                    "fp32_scaling": point["compute_s"] / others["FP32"]["s"],
                    "paper_fp32_scaling": figures.scaling,
                    "over_bound": planned_s / point["free_compression_s"] - 1,
                    "gains": {name: others[name]["s"] / planned_s - 1 for name in others},
                    "paper_gains": figures.gains,
                }
            )
    return {"rows": rows}


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """One row for each case and link; the paper's figures in brackets."""
    names = list(result["rows"][0]["gains"])
    title = f"At {RANKS} GPUs: scaling factor of FP32, distance to the upper bound and gains of the plan [the paper's]"
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(("case", "link", "FP32 scales", "over bound", *(f"over {name}" for name in names))):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in result["rows"]:
        gains = []
        for name in names:
            given = row["paper_gains"].get(name)
            gains.append(f"{row['gains'][name]:+.0%}" + ("" if given is None else f" [{given:+.0%}]"))
        factor = row["paper_fp32_scaling"]
        table.add_row(
            f"{row['model']} + {row['codec']}, {row['testbed']}",
            f"{row['link']}, {row['gbit_per_s']:.0f} Gbit/s" if row["link"] == "effective" else row["link"],
            f"{row['fp32_scaling']:.2f}" + ("" if factor is None else f" [{factor:.2f}]"),
            f"{row['over_bound']:.1%} [< {WITHIN:.0%}]",
            *gains,
        )
    yield table

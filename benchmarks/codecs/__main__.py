"""Speed of every codec with feedback, beside the limits of this machine's memory and plain torch renderings.

OMP_NUM_THREADS=1 python -m benchmarks.codecs [--repeats 15] [--out benchmarks/results/codecs.json]
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from espresso_ds.compressors import native
from espresso_ds.core.record import write_json

from ..machine import machine
from .cases import SUBJECTS
from .measure import SIZES, Rows, one_thread, two_threads

RESULTS = Path(__file__).resolve().parents[1] / "results/codecs.json"
_POWER = {numel: f"2^{numel.bit_length() - 1}" for numel in SIZES}


def table(rows: Rows, key: str, figure: str, title: str, form: str = "{:.2f}") -> Table:
    """Codecs down, sizes across."""
    found = Table(title=title)
    for column in (key, "what", *_POWER.values()):
        found.add_column(column, justify="left" if column in (key, "what") else "right")
    for name, what in dict.fromkeys((row[key], row.get("what", "")) for row in rows if row[figure] is not None):
        cells = [row for row in rows if (row[key], row.get("what", "")) == (name, what)]
        found.add_row(str(name), str(what), *(form.format(cell[figure]) for cell in cells))
    return found


def bars(rows: Rows) -> list[str]:
    """Each bar of a fused kernel, and whether it is met."""
    said = []
    for subject in SUBJECTS:
        own = [row for row in rows if row["codec"] == subject.name]
        if subject.bar is not None:
            shares = [(row["numel"], row["share_of_limit"]) for row in own if row["what"] == "encode"]
            missed = [
                f"{_POWER[numel]}: {share:.2f}"
                for numel, share in shares
                if share < (subject.bar.large if numel >= 1 << 20 else subject.bar.small)
            ]
            asked = f"{subject.bar.large:.0%} of `r += g` from 2^20, {subject.bar.small:.0%} below"
            said.append(f"{subject.name}: {asked}: {'MISSED at ' + ', '.join(missed) if missed else 'met'}")
        if subject.peer is not None:
            times = [row["times_plain_torch"] for row in own if row["what"] == "encode"]
            said.append(f"{subject.name}: {min(times):.1f}x plain torch at least, {statistics.median(times):.1f}x in the median")
    every = [row["times_plain_torch"] for row in rows if row["what"] == "encode" and row["times_plain_torch"] is not None]
    return [
        *said,
        f"all encoders and sizes: {min(every):.1f}x plain torch at least, {statistics.median(every):.1f}x in the median",
    ]


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codecs", description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    about = machine() | {"torch": torch.__version__, "cpu_level": native.cpu_level(), "repeats": arguments.repeats}
    one = [row for numel in SIZES for row in one_thread(numel, arguments.repeats)]
    two = [row for numel in SIZES for row in two_threads(numel, arguments.repeats)]
    said = bars(one)
    write_json(arguments.out, {"machine": about, "one_thread": one, "two_threads": two, "bars": said})
    console = Console(width=160)
    console.print(table(one, "codec", "gb_per_s", "GB/s of fp32 input, one thread"))
    console.print(table(one, "codec", "share_of_limit", "share of the limit: `r += g` for encoding, memory traffic for decoding"))
    console.print(table(one, "codec", "times_plain_torch", "times as fast as plain torch", "{:.1f}"))
    console.print(table(two, "case", "speed_up", "two threads over one"))
    console.print("\n".join(said))


if __name__ == "__main__":
    main()

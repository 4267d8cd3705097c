"""Results as markdown: each cell's variants against plain DeepSpeed, bf16 on the wire, and their predictions."""

from __future__ import annotations

from pathlib import Path

from .results import BF16, PLAIN, CellResult

_HEAD = ("model, stages, links", "variant", "step, s", "x plain", "x bf16", "bytes, of plain", "predicted / measured")


def report(folder: Path) -> str:
    """A table of all cells of a folder."""
    cells = [CellResult.load(path) for path in sorted(folder.glob("*.json"))]
    rows = [row for cell in cells for row in _rows(cell)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (_HEAD, ("---",) * len(_HEAD), *rows))


def _rows(cell: CellResult) -> list[tuple[str, ...]]:
    plain, narrow = cell.variants[PLAIN], cell.variants[BF16]
    rows = []
    for name, each in cell.variants.items():
        foretold = "" if each.predicted_s is None else f"{each.predicted_s:.3f} s, {each.predicted_s / each.median_s - 1:+.0%}"
        rows.append(
            (
                f"{cell.model}, {cell.stages}, {cell.rate}",
                name,
                f"{each.median_s:.3f}",
                f"{plain.median_s / each.median_s:.2f}",
                f"{narrow.median_s / each.median_s:.2f}",
                f"{each.sent_bytes / plain.sent_bytes:.1%}",
                foretold,
            )
        )
    return rows

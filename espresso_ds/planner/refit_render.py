"""What a refit changed and what it explains, as rich tables."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .refit_record import Correction, Refit


def table(found: Refit) -> RenderableType:
    """The step that ran, before and after; then every correction with its reason."""
    return Group(_step(found), _corrections(found), Text("\n".join(found.notes), style="dim"))


def _step(found: Refit) -> Table:
    title = f"The plan that ran, medians of {len(found.steps)} steps, in ms"
    shown = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    shown.add_column("")
    for column in ("predicted", "measured", "corrected prediction"):
        shown.add_column(column, justify="right")
    for row in found.rows:
        shown.add_row(row.what, _ms(row.before_s), _ms(row.measured_s), _ms(row.after_s))
    return shown


def _corrections(found: Refit) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, title="Corrections of the profiles", title_justify="left")
    for column in ("what", "times", "and", "why"):
        shown.add_column(column, justify="right" if column in ("times", "and") else "left", overflow="fold")
    for correction in found.corrections:
        shown.add_row(correction.what, _scale(correction), _offset(correction), correction.why)
    return shown


def _scale(correction: Correction) -> str:
    return "" if correction.scale == 1.0 else f"{correction.scale:.2f}"


def _offset(correction: Correction) -> str:
    sign = "+" if correction.offset_s > 0 else ""
    return f"{sign}{_ms(correction.offset_s)} ms" if abs(correction.offset_s) >= 5e-7 else ""


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}" if abs(seconds) < 0.01 else f"{seconds * 1e3:.1f}"

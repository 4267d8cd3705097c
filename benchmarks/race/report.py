"""The race's results for people: tables, the bars, markdown for the README, pictures.

python -m benchmarks.race report [--markdown] [--pictures docs] [--models gpt2-30m,vgg]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from . import pictures as drawing
from .bars import TITLES, Check, above_bound, checks, loss, off_prediction, speed_up
from .results import BOUND, CAST_HOOKS, OURS, PLAIN, REPLANNED, CellResult, Variant, in_order, load_cells

Column = tuple[str, Callable[[CellResult, str], str]]


def main(arguments: Sequence[str], results: Path) -> None:
    """Run `report` with its arguments; `results` is the default folder of results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.race report", description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=results, help="folder (default: %(default)s)")
    parser.add_argument("--models", help="comma-separated (default: all)")
    parser.add_argument("--markdown", action="store_true", help="print markdown in place of tables")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="draw race-*.png into it")
    given = parser.parse_args(arguments)
    cells = load_cells(given.results)
    if given.models:
        wanted = given.models.split(",")
        if unknown := set(wanted) - {cell.model for cell in cells}:
            parser.error(f"no results of {', '.join(sorted(unknown))}; there are {', '.join(sorted({c.model for c in cells}))}")
        cells = [cell for cell in cells if cell.model in wanted]
    console = Console(width=None if Console().is_terminal else 200)
    if given.markdown:
        print(markdown(cells))
    else:
        for table in tables(cells):
            console.print(table)
    for path in pictures(cells, given.pictures) if given.pictures else []:
        console.print(f"drawn: {path}")


def tables(results: Sequence[CellResult]) -> list[Table]:
    """A table for each cell with all variants, then the cells against the bars, then the bars over all cells."""
    cells = in_order(list(results))
    return [*map(_cell_table, cells), *_bar_tables(checks(cells))]


def markdown(results: Sequence[CellResult]) -> str:
    """A line for each cell, then the bars, as two markdown tables."""
    cells = in_order(list(results))
    rows = [[words(cell) for _, words in _CELL_COLUMNS] for cell in cells]
    heads = [head for head, _ in _CELL_COLUMNS]
    bars = [[TITLES[key], asked, f"{met} of {of}", missed or "-"] for key, asked, met, of, missed in _totals(checks(cells))]
    return f"{_markdown(heads, rows)}\n\n{_markdown(['bar', 'asked', 'met in', 'not met'], bars)}"


def pictures(results: Sequence[CellResult], folder: Path) -> list[Path]:
    """Draw `race-MODEL.png` for each model and `race-predicted.png` into the folder, and say which."""
    cells = in_order(list(results))
    models = dict.fromkeys(cell.model for cell in cells)
    drawn = [drawing.steps([cell for cell in cells if cell.model == model], folder / f"race-{model}.png") for model in models]
    return [*drawn, *drawing.predictions(cells, folder / "race-predicted.png")]


def _cell_table(cell: CellResult) -> Table:
    about = f"{cell.machine.get('processor', '?')}, {cell.machine.get('cores', '?')} cores, {cell.machine.get('taken', '?')}"
    title = (
        f"{cell.name}: {cell.rounds} rounds; {about}; * fastest peer; exposed: after backward, plans only; loss: mean over seeds"
    )
    shown = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    shown.add_column("", no_wrap=True)
    for head, _ in _VARIANT_COLUMNS:
        shown.add_column(head, justify="right")
    notes = {name: each.note for name, each in cell.variants.items() if each.note}
    fastest = cell.fastest()
    for name, variant in cell.variants.items():
        style = "bold" if variant.kind == "ours" else "dim" if variant.kind == "crippled" else None
        words = (form(cell, name) for _, form in _VARIANT_COLUMNS)
        shown.add_row(f"{name} *" if name == fastest else name, *words, style=style)
    if notes:
        shown.caption = "; ".join(f"{name}: {note}" for name, note in notes.items())
    return shown


def _bar_tables(found: Sequence[Check]) -> list[Table]:
    """Cells down and bars across with what was found; then a line for each bar."""
    grid = Table(box=box.SIMPLE_HEAD, title="Cells against the bars", title_justify="left")
    grid.add_column("", no_wrap=True)
    for title in TITLES.values():
        grid.add_column(title, justify="right")
    by_place = {(check.cell, check.bar): check for check in found if check.cell}
    for cell in dict.fromkeys(place[0] for place in by_place):
        grid.add_row(cell, *(_styled(by_place.get((cell, bar))) for bar in TITLES))
    totals = Table(box=box.SIMPLE_HEAD, title="Bars", title_justify="left")
    for head in ("", "asked", "met in", "not met"):
        totals.add_column(head)
    for key, asked, met, of, missed in _totals(found):
        totals.add_row(TITLES[key], asked, f"{met} of {of}", missed)
    return [grid, totals]


def _styled(check: Check | None) -> str:
    if check is None:
        return ""
    colour, verdict = {True: ("green", "met"), False: ("red", "MISSED"), None: ("yellow", "not measured")}[check.met]
    return f"[{colour}]{check.figure} {verdict}[/]"


def _totals(found: Sequence[Check]) -> list[tuple[str, str, int, int, str]]:
    """For each bar and what it asks: in how many places it is met, of how many, and where not."""
    groups: dict[tuple[str, str], list[Check]] = {}
    for check in found:
        groups.setdefault((check.bar, check.asked), []).append(check)
    return [
        (bar, asked, sum(check.met is True for check in group), len(group), "; ".join(_missed(c) for c in group if not c.met))
        for (bar, asked), group in groups.items()
    ]


def _missed(check: Check) -> str:
    return f"{check.cell} ({'not measured' if check.met is None else check.figure})".strip()


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:+.0%}"


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.3f}"


def _spread(cell: CellResult, name: str) -> str:
    first, third = cell.variants[name].quartiles_s
    return f"{first:.3f} to {third:.3f}"


def _cpu(cell: CellResult, name: str) -> str:
    cpu = cell.variants[name].cpu_s
    return _seconds(sum(cpu) / len(cpu)) if cpu else "-"


def _sent(cell: CellResult, name: str) -> str:
    found = cell.variants.get(name)
    return "-" if found is None or found.sent_bytes is None else f"{found.sent_bytes / 1e6:.3g}"


def _loss(cell: CellResult, name: str) -> str:
    return loss(cell.losses[name].mean) if name in cell.losses else "-"


def _over_bound(cell: CellResult, name: str) -> str:
    above = above_bound(cell, name)
    return _ratio(None if above is None else above + 1)


def _predicted(cell: CellResult, name: str) -> str:
    off = off_prediction(cell, name)
    return _ratio(None if off is None else off + 1)


def _of(read: Callable[[Variant], float | None]) -> Callable[[CellResult, str], str]:
    return lambda cell, name: _seconds(read(cell.variants[name]))


_VARIANT_COLUMNS: tuple[Column, ...] = (
    ("step, s", _of(lambda variant: variant.median_s)),
    ("middle half", _spread),
    ("steps", lambda cell, name: str(len(cell.variants[name].step_s))),
    ("plain / this", lambda cell, name: _ratio(speed_up(cell, PLAIN, over=name))),
    ("this / compute only", _over_bound),
    ("predicted / measured", _predicted),
    ("exposed link, s", _of(lambda variant: variant.exposed_communication_s)),
    ("exposed codec, s", _of(lambda variant: variant.exposed_compression_s)),
    ("CPU s, all ranks", _cpu),
    ("MB sent", _sent),
    ("held-out loss", _loss),
)


def _peer(cell: CellResult, name: str | None) -> str:
    return "-" if name is None else f"{_seconds(cell.step_s(name))} ({name})"


def _losses(cell: CellResult) -> str:
    return f"{_loss(cell, OURS)}, {_loss(cell, cell.fastest() or '')}"


_CELL_COLUMNS: tuple[tuple[str, Callable[[CellResult], str]], ...] = (
    ("model", lambda cell: cell.model),
    ("hosts x ranks", lambda cell: cell.cluster),
    ("links", lambda cell: cell.link),
    ("plain DeepSpeed, s", lambda cell: _seconds(cell.step_s(PLAIN))),
    ("better cast hook, s", lambda cell: _peer(cell, cell.fastest(CAST_HOOKS))),
    ("fastest peer, s", lambda cell: _peer(cell, cell.fastest())),
    ("**planned, s**", lambda cell: f"**{_seconds(cell.step_s(OURS))}**"),
    ("compute only, s", lambda cell: _seconds(cell.step_s(BOUND))),
    ("plain / planned", lambda cell: f"**{_ratio(speed_up(cell, PLAIN))}**"),
    ("fastest peer / planned", lambda cell: _ratio(speed_up(cell, cell.fastest()))),
    ("above compute only", lambda cell: _share(above_bound(cell))),
    ("predicted off by", lambda cell: _share(off_prediction(cell))),
    ("replanned, s", lambda cell: _seconds(cell.step_s(REPLANNED))),
    ("predicted off by, replanned", lambda cell: _share(off_prediction(cell, REPLANNED))),
    ("MB sent, plain and planned", lambda cell: f"{_sent(cell, PLAIN)}, {_sent(cell, OURS)}"),
    ("loss, planned and fastest peer", _losses),
)

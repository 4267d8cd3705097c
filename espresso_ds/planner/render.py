"""Plans and timelines for people: tables for the terminal, pictures for reports."""

from __future__ import annotations

from collections import Counter
from itertools import groupby
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..core.errors import FileError, nearest
from ..core.option import UNCOMPRESSED, Option
from ..core.plan import Plan, TensorDecision
from .cost import LINKS, Resource
from .measured import COPIES
from .pictures import check_picture
from .timeline import Span, Timeline

_COLOURS = {
    "forward": "#b9c6d3",
    "backward": "#7f96ad",
    "optimizer": "#d9dee4",
    "model": "#9fb0c2",
    "compress": "#e08a1e",
    "decompress": "#f2c14e",
    "copy": "#a58bc4",
    "communicate, uncompressed": "#c0392b",
    "communicate, compressed": "#2e8b57",
}
_ROW_NAMES = {
    Resource.COMPUTE: "compute",
    Resource.CPU: "codec on CPU",
    Resource.INTRA: "link inside node",
    Resource.INTER: "link between nodes",
}


def explain(plan: Plan, name: str | None = None) -> RenderableType:
    """What was decided and what to expect, for rich's console; for one tensor if `name` is given.

    Raises:
        FileError: the plan has no tensor of that name.
    """
    if name is not None:
        return _one_tensor(plan, name)
    return Group(_verdict(plan), _summary(plan), *_memory(plan), _units(plan))


def draw(timelines: dict[str, Timeline], path: str | Path) -> None:
    """Write a picture of the timelines, one below the other on one time axis; the suffix of `path` says the format.

    Args:
        timelines: title to timeline.
        path: where to, such as timeline.png.

    Raises:
        FileError: the suffix is that of no picture format, or there is no directory for it.
    """
    check_picture(path)
    with matplotlib.rc_context({"font.size": 10, "svg.fonttype": "none"}):
        shown = {
            title: [row for row in Resource if any(s.resource is row for s in line.spans)] for title, line in timelines.items()
        }
        heights = [len(rows) for rows in shown.values()]
        figure = Figure(figsize=(12, 1.1 + sum(0.45 * rows + 0.75 for rows in heights)), layout="constrained")
        panels = figure.subplots(len(timelines), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        longest = max(timeline.iteration_s for timeline in timelines.values())
        unit, scale = ("s", 1.0) if longest >= 2 else ("ms", 1e3)
        used: set[str] = set()
        for axes, (title, timeline) in zip(panels, timelines.items(), strict=True):
            rows = shown[title]
            packed = _packed_units(timeline)
            for span in timeline.spans:
                kind = _kind(span, packed)
                if span.end_s > span.start_s:
                    used.add(kind)
                extent = [(span.start_s * scale, (span.end_s - span.start_s) * scale)]
                edge = "white" if span.end_s - span.start_s > longest / 150 else "none"
                axes.broken_barh(
                    extent, (rows.index(span.resource) - 0.4, 0.8), color=_COLOURS[kind], edgecolor=edge, linewidth=0.6
                )
            axes.axvline(timeline.iteration_s * scale, color="black", linewidth=1.2)
            axes.axvline(timeline.backward_end_s * scale, color="black", linewidth=0.8, linestyle=":")
            axes.set_yticks(range(len(rows)), [_ROW_NAMES[row] for row in rows])
            axes.set_ylim(len(rows) - 0.4, -0.6)
            axes.set_title(
                f"{title}: {timeline.iteration_s * scale:.4g} {unit} a step, {timeline.exposed_s * scale:.3g} {unit} of it "
                "waiting for synchronisation",
                loc="left",
                fontsize=10.5,
            )
            for side in ("top", "right", "left"):
                axes.spines[side].set_visible(False)
            axes.tick_params(axis="y", length=0)
        panels[-1].set_xlim(0, longest * scale * 1.01)
        panels[-1].set_xlabel(f"{unit} from the start of the step (dotted: backward ends; solid: the step ends)")
        handles = [Patch(color=colour, label=kind) for kind, colour in _COLOURS.items() if kind in used]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
        figure.savefig(path, dpi=150)


def _kind(span: Span, packed: set[tuple[int, float]]) -> str:
    if span.unit < 0:
        return span.action
    if span.action in COPIES.values():
        return "copy"
    if span.resource not in LINKS:
        return "compress" if span.action.startswith("C.") else "decompress"
    return "communicate, compressed" if (span.unit, span.start_s) in packed else "communicate, uncompressed"


def _packed_units(timeline: Timeline) -> set[tuple[int, float]]:
    """The routines, as (unit, start), that carry payloads: those between a C and its D."""
    packed, compressed = set(), set()
    for span in sorted(timeline.spans, key=lambda span: (span.start_s, span.end_s)):
        if span.action.startswith("C."):
            compressed.add(span.unit)
        elif span.action.startswith("D."):
            compressed.discard(span.unit)
        elif span.resource in LINKS and span.unit in compressed:
            packed.add((span.unit, span.start_s))
    return packed


def _verdict(plan: Plan) -> Text:
    """Whether compression pays, in one sentence."""
    p = plan.predicted
    compressed = _compressed(plan)
    if compressed:
        return Text(
            f"Compression pays: {_seconds(p.planned_s)} a step instead of {_seconds(p.stock_s)} "
            f"({p.stock_s / p.planned_s:.2f}x); "
            f"{len(compressed)} of {len(plan.tensors)} tensors are compressed with {_codecs(plan, compressed)}. "
            f"{_certificate(plan)}",
            style="bold green",
        )
    return Text(
        f"Nothing is compressed. Overlapped with backward, a step takes {_seconds(p.planned_s)} instead of {_seconds(p.stock_s)} "
        f"({p.stock_s / p.planned_s:.2f}x); without any synchronisation it would take {_seconds(p.compute_s)}. "
        f"{_certificate(plan)}",
        style="bold yellow",
    )


def _certificate(plan: Plan) -> str:
    """How far the best of all strategies can be away."""
    if plan.predicted.gap < 5e-4:
        return "No strategy is faster."
    least = _seconds(plan.predicted.lower_bound_s)
    return f"No strategy is faster than {least}: this plan is within {plan.predicted.gap:.1%} of the best."


def _codecs(plan: Plan, compressed: list[TensorDecision]) -> str:
    """The codecs in use, with the number of their tensors where there are several."""
    used = Counter(tensor.codec for tensor in compressed)
    if len(used) == 1:
        return plan.compressors[next(iter(used))].label
    return "; ".join(f"{plan.compressors[codec].label} ({count})" for codec, count in sorted(used.items()))


def _summary(plan: Plan) -> Table:
    p = plan.predicted
    table = Table(box=box.SIMPLE_HEAD, title="Predicted step", title_justify="left")
    for column in ("", "time", "against DeepSpeed", "sent per rank"):
        table.add_column(column, justify="left" if not column else "right", overflow="fold")
    rows: tuple[tuple[str, float, int], ...] = (
        ("DeepSpeed as it is", p.stock_s, p.uncompressed_bytes),
        ("uncompressed, overlapped", p.uncompressed_s, p.uncompressed_bytes),
        ("this plan", p.planned_s, p.planned_bytes),
        ("if compression took no time", p.free_compression_s, 0),
        ("lower bound of all strategies", p.lower_bound_s, 0),
        ("no synchronisation", p.compute_s, 0),
    )
    for label, time, sent in rows:
        style = "bold" if label == "this plan" else None
        table.add_row(
            label, _seconds(time), f"{p.stock_s / time:.2f}x" if time else "", _bytes(sent) if sent else "", style=style
        )
    return table


def _memory(plan: Plan) -> list[Text]:
    """What the plan takes of each rank's memory, if it says so."""
    if plan.step is None:
        return []
    kept, buffers = _bytes(plan.step.feedback_bytes), _bytes(plan.step.buffer_bytes)
    return [Text(f"Memory of a rank, at most: {kept} of error feedback and {buffers} of buffers.")]


def _units(plan: Plan) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="Tensors, in the order on the wire", title_justify="left")
    table.add_column("unit", justify="right")
    table.add_column("tensor", overflow="fold")
    table.add_column("elements", justify="right")
    table.add_column("option", max_width=32)
    table.add_column("why", max_width=44)
    for number, unit in enumerate(plan.units()):
        for place, tensor in enumerate(unit):
            first = place == 0
            table.add_row(
                str(number) if first else "",
                tensor.name,
                f"{tensor.numel:,}",
                Text(tensor.option, style="green" if _is_compressed(tensor) else "") if first else "",
                tensor.why if first else "",
                end_section=place + 1 == len(unit),
            )
    return table


def _one_tensor(plan: Plan, name: str) -> Table:
    known = {tensor.name: tensor for tensor in plan.tensors}
    if name not in known:
        raise FileError(f"the plan has no tensor {name!r}{nearest(name, known)}")
    tensor = known[name]
    with_it = [other.name for other in plan.tensors if other.unit == tensor.unit and other.name != name]
    table = Table(box=box.SIMPLE, show_header=False, title=name, title_justify="left")
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    shape = " x ".join(map(str, tensor.shape)) or "scalar"
    table.add_row("shape", f"{shape}, {tensor.numel:,} elements of {tensor.dtype}")
    if _is_compressed(tensor):
        table.add_row("codec", plan.compressors[tensor.codec].label)
    table.add_row("option", tensor.option + (" (uncompressed allreduce)" if Option.parse(tensor.option) == UNCOMPRESSED else ""))
    table.add_row(
        "unit", f"{tensor.unit} (of 0 to {plan.tensors[-1].unit})" + (f", with {', '.join(with_it)}" if with_it else ", alone")
    )
    table.add_row("saves", f"{_seconds(tensor.saves_s)} a step, with its whole unit")
    table.add_row("why", tensor.why)
    table.add_row("plan", _certificate(plan))
    return table


def _compressed(plan: Plan) -> list[TensorDecision]:
    return [tensor for tensor in plan.tensors if _is_compressed(tensor)]


def _is_compressed(tensor: TensorDecision) -> bool:
    return Option.parse(tensor.option).compresses


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if abs(seconds) >= 1 else f"{seconds * 1e3:.3g} ms"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def explain_path(timeline: Timeline) -> Table:
    """What the step's end waits for, for rich's console: the critical path, consecutive work of one kind summed up."""
    table = Table(box=box.SIMPLE_HEAD, title="What the step waits for (critical path)", title_justify="left")
    for column in ("from", "for", "what", "of"):
        table.add_column(column, justify="right" if column in ("from", "for") else "left", overflow="fold")
    for (resource, action), spans in groupby(timeline.critical_path, key=lambda span: (span.resource, span.action)):
        run = list(spans)
        names = list(dict.fromkeys(span.name for span in run if span.name))
        of = names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "") if names else ""
        seconds = sum(span.end_s - span.start_s for span in run)
        what = action if resource is Resource.COMPUTE and not names else f"{action} on {_ROW_NAMES[resource]}"
        table.add_row(_seconds(run[0].start_s), _seconds(seconds), what, of)
    return table

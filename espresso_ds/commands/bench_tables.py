"""The tables of `espresso bench`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from rich.table import Table
from rich.text import Text

from ..core.people import people_bytes, people_seconds
from ..profiler.bench_report import P2P, CodecReport, NetReport, NetRow

UNITS: Mapping[str, float] = MappingProxyType({"MB/s": 1e6, "GB/s": 1e9, "Mbit/s": 1.25e5, "Gbit/s": 1.25e8})
"""Bytes per second of each unit of bandwidth."""
_FAST = 1e9


def net_tables(report: NetReport, unit: str | None = None) -> list[Table | str]:
    """A table of routines, then the links, the routines beside them, and what was left out."""
    fastest = max(row.algorithm_bytes_per_s for row in report.rows)
    unit = unit or ("GB/s" if fastest >= _FAST else "MB/s")
    hosts = f"{_count(len(report.hosts), 'host')} x {_count(report.ranks_per_node, 'rank')}"
    table = Table(title=f"{report.library}, {hosts}, {report.dtype}, medians of {report.trials} trials")
    table.add_column("routine")
    for column in ("size", "time", "min..max", f"algbw {unit}", f"busbw {unit}", "of link", "slowest", "wrong"):
        table.add_column(column, justify="right", no_wrap=True)
    for where in dict.fromkeys(row.where for row in report.rows):
        rows = [row for row in report.rows if row.where == where]
        table.add_section()
        table.add_row(Text(f"{where} ({_people(rows[0])})", "bold"))
        for name in dict.fromkeys(row.routine for row in rows):
            for row in rows:
                if row.routine == name:
                    table.add_row(*_cells(row, UNITS[unit]))
    return [table, *_links(report, unit), *(f"left out: {text}" for text in report.left_out), _host(report.machine)]


def kernels_text(report: CodecReport) -> list[Text]:
    """Which kernels worked, loudly where plain torch did on its own."""
    kinds: dict[str, list[str]] = {}
    for facts in report.codecs:
        text = " / ".join(dict.fromkeys(facts.kernels.values()))
        kinds.setdefault(text, []).append(facts.codec.partition(" ")[0].rstrip(","))
    lines = []
    for text, names in kinds.items():
        slow = "plain torch" in text
        lines.append(
            Text(f"kernels: {text.upper() if slow else text}: {', '.join(dict.fromkeys(names))}", "bold red" if slow else "bold")
        )
    return lines


def codec_tables(report: CodecReport) -> list[Table | str]:
    """Codecs by size, the limits of memory first."""
    table = Table(
        title=f"{report.device}, {_count(report.threads, 'thread')}, medians of {report.trials} trials, GB/s of fp32 input"
    )
    table.add_column("codec")
    for column in ("encode", "of r+=g", "decode", "of copy", "payload", "rel. error"):
        table.add_column(column, justify="right", no_wrap=True)
    errors = {facts.codec: facts.relative_error for facts in report.codecs}
    for limit in report.limits:
        table.add_section()
        table.add_row(
            Text(f"{people_bytes(limit.nbytes)}: r += g; copy", "bold"),
            _number(limit.add_bytes_per_s / 1e9),
            "",
            _number(limit.copy_bytes_per_s / 1e9),
        )
        for row in report.rows:
            if row.nbytes == limit.nbytes:
                table.add_row(
                    row.codec,
                    _number(row.encode_bytes_per_s / 1e9),
                    f"{row.encode_share:.0%}",
                    _number(row.decode_bytes_per_s / 1e9),
                    f"{row.decode_share:.0%}",
                    f"{row.payload_ratio:.2%}",
                    f"{errors[row.codec]:.2g}",
                )
    return [table, "encode includes error feedback; decode adds one payload to a sum", _host(report.machine)]


def _links(report: NetReport, unit: str) -> Iterable[str]:
    """Each link's rate and latency, and how much of it the routines between the ranks that it joins make use of."""
    for level, rows in report.link_rows().items():
        small, large = rows[0], rows[-1]
        yield (
            f"link, {small.where}: {_number(large.algorithm_bytes_per_s / UNITS[unit])} {unit} ({people_bytes(large.nbytes)}), "
            f"latency {people_seconds(small.median_s)} ({people_bytes(small.nbytes)})"
        )
        others = [row for row in report.rows if row.routine != P2P and report.link(row.level) is level]
        for where, routine in dict.fromkeys((row.where, row.routine) for row in others):
            same = [row for row in others if (row.where, row.routine) == (where, routine)]
            small, large = same[0], same[-1]
            yield (
                f"  {routine}, {where}: {large.link_share:.0%} of the link ({people_bytes(large.nbytes)}), "
                f"latency {people_seconds(small.median_s)} ({people_bytes(small.nbytes)})"
            )


def _cells(row: NetRow, unit: float) -> list[str | Text]:
    wrong = Text(str(row.wrong), "bold red" if row.wrong else "")
    return [
        row.routine,
        people_bytes(row.nbytes),
        people_seconds(row.median_s),
        f"{people_seconds(min(row.seconds))}..{people_seconds(max(row.seconds))}",
        _number(row.algorithm_bytes_per_s / unit),
        _number(row.bus_bytes_per_s / unit),
        "" if row.link_share is None else f"{row.link_share:.0%}",
        "" if row.slowest_rank < 0 else f"rank {row.slowest_rank}",
        wrong,
    ]


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _people(row: NetRow) -> str:
    return f"{row.ranks} ranks" if row.groups == 1 else f"{row.groups} groups of {row.ranks} ranks"


def _host(machine: Mapping[str, object]) -> str:
    return (
        f"on {machine['host']}: {machine['processor']}, {machine['cores']} cores, GPUs: {machine['gpus']}, "
        f"{machine['system']}, torch {machine['torch']}, load {machine['load_average_1min']:.1f}"
    )


def _number(value: float) -> str:
    """Three digits, and no exponent where there are more."""
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"

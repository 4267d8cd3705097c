"""Timelines in the Trace Event Format, for chrome://tracing and Perfetto."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .cost import Resource
from .timeline import Span, Timeline

_OVERLAP_S = 1e-9  # a span that starts less than this before the end of another follows it


def to_chrome(timelines: Mapping[str, Timeline]) -> dict[str, Any]:
    """The timelines, predicted or measured, by title, as one trace; microseconds.

    A process for each, a thread for each resource. Measured work on one resource may overlap, which a thread cannot show: what
    overlaps goes to further threads of the same name.
    """
    events: list[dict[str, Any]] = []
    for pid, (title, timeline) in enumerate(timelines.items()):
        events.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": title}})
        threads = {int(resource): resource for resource in Resource}
        spans = []
        for resource in Resource:
            rows = _rows([span for span in timeline.spans if span.resource is resource])
            for row, row_spans in enumerate(rows):
                tid = int(resource) + row * len(Resource)
                threads[tid] = resource
                spans += [_event(span, pid, tid) for span in row_spans]
        events += [
            {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": resource.name.lower()}}
            for tid, resource in threads.items()
        ]
        events += spans
    return {"displayTimeUnit": "ms", "traceEvents": events}


def _event(span: Span, pid: int, tid: int) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": f"{span.action} {span.name}".strip(),
        "cat": span.resource.name.lower(),
        "pid": pid,
        "tid": tid,
        "ts": span.start_s * 1e6,
        "dur": (span.end_s - span.start_s) * 1e6,
        "args": {"unit": span.unit, "tensor": span.name, "action": span.action},
    }


def _rows(spans: list[Span]) -> list[list[Span]]:
    """The spans of one resource in as few rows as hold no overlap, by start."""
    rows: list[list[Span]] = []
    for span in sorted(spans, key=lambda span: (span.start_s, span.end_s)):
        free = next((row for row in rows if row[-1].end_s <= span.start_s + _OVERLAP_S), None)
        if free is None:
            rows.append([span])
        else:
            free.append(span)
    return rows

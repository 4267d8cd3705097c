"""Timelines in the Trace Event Format, for chrome://tracing and Perfetto."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .cost import Resource
from .timeline import Timeline


def to_chrome(timelines: Mapping[str, Timeline]) -> dict[str, Any]:
    """The timelines, by title, as one trace: a process for each, a thread for each resource; microseconds."""
    events: list[dict[str, Any]] = []
    for pid, (title, timeline) in enumerate(timelines.items()):
        events.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": title}})
        events += [
            {"ph": "M", "name": "thread_name", "pid": pid, "tid": int(resource), "args": {"name": resource.name.lower()}}
            for resource in Resource
        ]
        events += [
            {
                "ph": "X",
                "name": f"{span.action} {span.name}".strip(),
                "cat": span.resource.name.lower(),
                "pid": pid,
                "tid": int(span.resource),
                "ts": span.start_s * 1e6,
                "dur": (span.end_s - span.start_s) * 1e6,
                "args": {"unit": span.unit, "tensor": span.name, "action": span.action},
            }
            for span in timeline.spans
        ]
    return {"displayTimeUnit": "ms", "traceEvents": events}

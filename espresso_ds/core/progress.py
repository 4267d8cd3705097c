"""How a launched program tells its progress to the command that launched it: lines `@progress SHARE WHAT` on stdout."""

from __future__ import annotations

import re

_LINE = re.compile(r"@progress ([0-9.]+) (.*)")


def print_progress(share: float, what: str) -> None:
    """Print that `share` of the work, 0 to 1, is done and that `what` is being done now."""
    print(f"@progress {share:.3f} {what}", flush=True)


def parse_progress(line: str) -> tuple[float, str] | None:
    """Share of the work done and what is being done, if `line` is about progress."""
    found = _LINE.search(line)
    return (float(found[1]), found[2].strip()) if found else None

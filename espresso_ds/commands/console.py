"""Where tables are printed."""

from __future__ import annotations

import os
from typing import Any

from rich.console import Console

_WIDTH = 160


def wide_console(**settings: Any) -> Console:
    """A console as wide as the terminal, or as COLUMNS says; in files and pipes wide enough for all columns of our tables."""
    known = Console(**settings).is_terminal or "COLUMNS" in os.environ
    return Console(**settings, width=None if known else _WIDTH)

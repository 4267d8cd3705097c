"""Whether a picture can be written, asked before the work that it is to show."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from ..core.errors import FileError
from ..core.record import check_output


def check_picture(path: str | Path) -> None:
    """Raise FileError if the suffix is that of no picture format, or no file can be written there."""
    formats = Figure().canvas.get_supported_filetypes()
    if Path(path).suffix.lstrip(".") not in formats:
        raise FileError(f"{path}: the suffix says no picture format; use one of {', '.join(sorted(formats))}")
    check_output(path)

"""The few kinds of error that users meet. Each message names the offending value and what mends it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EspressoError(Exception):
    """Base of all errors raised on purpose by espresso_ds."""


class FileError(EspressoError):
    """A plan, profile or config file is missing, torn, edited, of a newer schema or of the wrong shape."""


class MismatchError(EspressoError):
    """The plan was made for something else than this run (model, world size, config), or ranks disagree."""


class UnsupportedError(EspressoError):
    """The run asks for a feature that the plan cannot be kept under."""


class SyncError(EspressoError):
    """Synchronising a tensor failed or ran past its deadline."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the known name closest to `name`, or the list of known names."""
    known = sorted(map(str, known))
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"

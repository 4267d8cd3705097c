"""What is said where DeepSpeed's insides are not those that this package knows."""

from __future__ import annotations

from ..core.errors import UnsupportedError


def unknown_deepspeed(lacks: str) -> UnsupportedError:
    """The error to raise, with the remedy; `lacks` says what is missing, such as "its engine has no step()"."""
    import deepspeed

    return UnsupportedError(
        f"deepspeed {deepspeed.__version__}: {lacks}; espresso_ds works with 0.19.8 and "
        "successors that keep it: install `deepspeed>=0.19.8,<0.20`"
    )

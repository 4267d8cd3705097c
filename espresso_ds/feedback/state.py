"""Feedback in a checkpoint: plain dicts, strings, numbers and tensors, so that `torch.load(weights_only=True)` reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypedDict

import torch
from torch import Tensor

from ..core.config import FeedbackMode
from ..core.errors import MismatchError
from ..core.memory import ResidualDtype, receiver_memory, sender_memory
from .memory import Site


class State(TypedDict):
    """What `Feedback.state_dict` returns. `scale`: what the tensors are multiplied by; `sites`: tensors by site and name."""

    mode: FeedbackMode
    dtype: ResidualDtype
    scale: float
    sites: dict[str, dict[str, Tensor]]


def read(state: Mapping[str, object], mode: FeedbackMode, dtype: ResidualDtype) -> tuple[float, dict[str, Site]]:
    """The scale and the sites, copied, of a state that was saved with this mode and dtype.

    Raises:
        MismatchError: it was saved with others, or is no whole and sound state.
    """
    _check_made_for(state, mode, dtype)
    scale, sites = state["scale"], state["sites"]
    if not isinstance(scale, float | int) or not (math.isfinite(scale) and scale > 0):
        raise MismatchError(f"feedback: the checkpoint's scale is {scale!r}, not a positive number; use an earlier checkpoint")
    if not isinstance(sites, Mapping):
        raise MismatchError(
            f"feedback: the checkpoint's sites are {type(sites).__name__}, not a mapping; use an earlier checkpoint"
        )
    layouts = {sender_memory(mode), sender_memory(mode, recompressed=True), receiver_memory(mode)}
    return float(scale), {name: _site(name, held, layouts, getattr(torch, dtype)) for name, held in sites.items()}


def _check_made_for(state: Mapping[str, object], mode: FeedbackMode, dtype: ResidualDtype) -> None:
    if missing := [key for key in State.__annotations__ if key not in state]:
        raise MismatchError(
            f"feedback: the checkpoint lacks {', '.join(missing)}; it was not written by this package: start without its feedback"
        )
    for key, field, ours in (("mode", "feedback", mode), ("dtype", "residual", dtype)):
        if state[key] != ours:
            raise MismatchError(
                f'feedback: the checkpoint was saved with "{field}": {state[key]!r}, this run has {ours!r}; '
                f"set it to {state[key]!r}, or start without the saved feedback"
            )


def _site(name: str, held: object, layouts: set[tuple[str, ...]], dtype: torch.dtype) -> Site:
    given = held if isinstance(held, Mapping) else {}
    names = next((layout for layout in layouts if layout and set(layout) == set(given)), None)
    if names is None:
        wanted = " or ".join(" and ".join(layout) for layout in sorted(layouts) if layout) or "nothing"
        raise MismatchError(
            f"feedback: site {name!r} holds {' and '.join(map(str, given)) or 'nothing'}, not {wanted}; {_FOREIGN}"
        )
    tensors = [_sound(f"{key} of site {name!r}", given[key], dtype) for key in names]
    if len({tensor.numel() for tensor in tensors}) > 1:
        sizes = ", ".join(f"{key} {tensor.numel()}" for key, tensor in zip(names, tensors, strict=True))
        raise MismatchError(f"feedback: the tensors of site {name!r} differ in size ({sizes}); {_FOREIGN}")
    return Site(names, tuple(tensor.detach().clone() for tensor in tensors))


def _sound(what: str, tensor: object, dtype: torch.dtype) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise MismatchError(f"feedback: {what} is {type(tensor).__name__}, not a tensor; {_FOREIGN}")
    if tensor.dtype != dtype or tensor.dim() != 1:
        raise MismatchError(
            f"feedback: {what} is {tensor.dtype} of shape {tuple(tensor.shape)}, not one-dimensional {dtype}; {_FOREIGN}"
        )
    if not tensor.isfinite().all():
        raise MismatchError(f"feedback: {what} holds NaN or Inf; use an earlier checkpoint")
    return tensor


_FOREIGN = "the checkpoint was not written by this package: use another one, or start without its feedback"

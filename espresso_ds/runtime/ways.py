"""From the settings of a pipeline to how tensors travel over each boundary, in each direction."""

from __future__ import annotations

from typing import Literal

import torch

from ..compressors import registry
from ..compressors.topk import TopK
from ..core.config import BoundarySettings, CompressorSettings, PipelineSettings
from ..core.errors import UnsupportedError
from ..feedback import Feedback
from ..feedback.examples import ExampleMemory
from .parcel import Chosen, Way

Direction = Literal["forward", "backward"]
Ways = dict[tuple[int, Direction], Way]
"""By boundary and direction; boundary b is between stages b and b + 1."""


def make(settings: PipelineSettings, stages: int) -> Ways:
    """How tensors travel between `stages` stages.

    Raises:
        UnsupportedError: settings of a boundary that there is not, or a memory that boundaries cannot have.
        FileError: a codec that there is not, or that cannot be made so.
    """
    if extra := next((boundary for boundary in settings.boundaries if boundary >= stages - 1), None):
        raise UnsupportedError(f'"boundaries": {extra}, but {stages} stages have boundaries 0 to {stages - 2}; remove it')
    ways: Ways = {}
    for boundary in range(stages - 1):
        own = of_boundary(settings, boundary)
        chosen = Chosen() if own.shared_indices else None
        given: dict[Direction, CompressorSettings | None] = {"forward": own.forward, "backward": own.backward}
        for direction, each in given.items():
            ways[boundary, direction] = _way(f"boundary {boundary} {direction}", each, settings, len(ways), chosen)
    return ways


def of_boundary(settings: PipelineSettings, boundary: int) -> BoundarySettings:
    """A boundary's own settings, or those for all."""
    return settings.boundaries.get(boundary, settings)


def _way(label: str, given: CompressorSettings | None, settings: PipelineSettings, stream: int, chosen: Chosen | None) -> Way:
    if given is None:
        return Way(label, None, per_example=settings.per_example, chosen=chosen)
    mode = given.feedback or "none"
    if mode == "dgc":
        raise UnsupportedError(f'{label}: "feedback": "dgc" is the momentum of gradients; choose "ef", "ef21" or "none"')
    codec = registry.make(given.model_copy(update={"feedback": mode}))
    if chosen is not None and (not isinstance(codec, TopK) or mode not in ("none", "ef")):
        raise UnsupportedError(f'{label}: "shared_indices" with {given.label}; choose topk with feedback "none" or "ef"')
    memory = Feedback("none" if mode == "aqsgd" else mode, getattr(torch, given.residual))
    examples = ExampleMemory(label, settings.example_memory, settings.example_bytes) if mode == "aqsgd" else None
    return Way(label, codec, memory, settings.per_example, given.seed + stream * 1_000_003, chosen, examples)

"""Compressing what crosses stage boundaries of a DeepSpeed PipelineEngine: its send and receive instructions, in our channels.

The engine's instructions stay as they are. While one of them runs that sends or receives activations or their gradients, `send`
and `recv` of deepspeed.runtime.pipe.p2p go through `runtime.crossing` for floating-point tensors. Integers, masks and
shapes take DeepSpeed's own way.
"""

from __future__ import annotations

import atexit
import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ..compressors import registry
from ..core.config import CompressorSettings, PipelineSettings
from ..core.errors import UnsupportedError
from ..core.plan import read_block
from ..feedback import Feedback
from ..runtime.agree import Agreement, meet
from ..runtime.crossing import Incoming, Outgoing, Way
from .guarding import tell
from .plan_source import PIPELINE_BESIDE_PLAN, named_by_env

MEETING_S = 60.0
"""How long a rank waits for the others to hear of the block."""

Direction = Literal["forward", "backward"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")


@dataclass
class _Instruction:
    """A send or receive instruction under way: its channel, how many tensors the channel may take, and how many it has."""

    channel: Outgoing | Incoming
    most: Callable[[], int]
    taken: int = 0


_current: _Instruction | None = None
"""The training thread's; a process has one."""


def attach_pipeline(engine: Any, config: dict[str, Any], where: str) -> None:
    """Make a PipelineEngine compress what crosses between its stages, as the "espresso" block says. Collective over all ranks.

    Args:
        engine: fresh from `deepspeed.initialize`.
        config: the DeepSpeed config, with a block that has "pipeline".
        where: name of the config, for messages.

    Raises:
        EspressoError: the same one on every rank: a bad block, an engine or a codec for which this is not possible, or ranks
            that disagree.
    """
    meet(MEETING_S)
    agreement = Agreement(dist.new_group(backend="gloo"))
    ways: Mapping[tuple[int, Direction], Way] = {}
    block = None
    with agreement.collecting():
        block = read_block(config, where)
        assert block is not None and block.pipeline is not None
        if block.plan is not None or named_by_env():
            raise UnsupportedError(PIPELINE_BESIDE_PLAN)
        ways = ways_of(engine, block.pipeline)
    agreement.settle({"pipeline": "" if block is None else repr(block.pipeline)})
    assert block is not None and block.pipeline is not None
    engine.espresso = PipelineAttachment(engine, ways, block.pipeline.evaluation == "as trained", block.timeout_s)
    tell_ways(ways)


def tell_ways(ways: Mapping[tuple[int, Direction], Way]) -> None:
    """One line for people: how tensors travel."""
    tell("; ".join(["pipeline boundaries compressed", *(f"{way.label}: {way.kind}" for way in ways.values())]))


def ways_of(engine: Any, settings: PipelineSettings) -> Mapping[tuple[int, Direction], Way]:
    """How tensors will travel, by boundary and direction.

    Raises:
        EspressoError: an engine or a codec for which this is not possible.
    """
    _check(engine)
    return _ways(settings, engine.num_stages)


class PipelineAttachment:
    """What `engine.espresso` holds for a PipelineEngine: the channels of this stage, and the way to take them off (`detach`).

    Args:
        engine: a PipelineEngine, fresh from `deepspeed.initialize`.
        ways: how tensors travel, by boundary and direction; alike on all ranks.
        evaluates: whether `eval_batch` compresses too.
        timeout_s: deadline of every wait for another stage.
    """

    def __init__(self, engine: Any, ways: Mapping[tuple[int, Direction], Way], evaluates: bool, timeout_s: float) -> None:
        from deepspeed.runtime.pipe import p2p, schedule

        self.ways, self.evaluates = ways, evaluates
        self._engine = engine
        self._channels = _channels(engine, ways, timeout_s)
        _patch(p2p)
        kinds = {
            schedule.SendActivation: (engine.stage_id, "forward"),
            schedule.RecvActivation: (engine.stage_id - 1, "forward"),
            schedule.SendGrad: (engine.stage_id - 1, "backward"),
            schedule.RecvGrad: (engine.stage_id, "backward"),
        }
        ours = {kind: self._through(kind, place) for kind, place in kinds.items() if place in self._channels}
        engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, **ours}
        self._buffers: dict[tuple[int, torch.dtype], Tensor] = {}
        engine._allocate_or_extend_buffers = self._buffer
        atexit.register(self.detach)

    def detach(self) -> None:
        """Give the engine back as it was, and end the channels. On all ranks, between steps."""
        if self._engine is None:
            return
        for name in ("_INSTRUCTION_MAP", "_allocate_or_extend_buffers"):
            vars(self._engine).pop(name, None)
        self._engine = None
        for kind in (Outgoing, Incoming):
            for channel in self._channels.values():
                if isinstance(channel, kind):
                    channel.close()
        atexit.unregister(self.detach)

    def _through(self, kind: type, place: tuple[int, Direction]) -> Callable[..., None]:
        """DeepSpeed's function for an instruction, with what it sends and receives going through a channel."""
        original, channel = self._engine._INSTRUCTION_MAP[kind], self._channels[place]

        @functools.wraps(original)
        def instruction(engine: Any, *args: Any, **kwargs: Any) -> None:
            global _current
            if not torch.is_grad_enabled() and not self.evaluates:
                original(engine, *args, **kwargs)
                return
            _current = _Instruction(channel, functools.partial(_floats, engine, kind.__name__, *args, **kwargs))
            try:
                original(engine, *args, **kwargs)
            finally:
                _current = None

        return instruction

    def _buffer(self, index: int, shape: list[int], dtype: torch.dtype) -> Tensor:
        """As DeepSpeed's, which forgets the dtype: it gives out a buffer of another one, and the stages wait for each other."""
        numel = 1
        for length in shape:
            numel *= length
        held = self._buffers.get((index, dtype))
        if held is None or held.numel() < numel:
            held = self._buffers[index, dtype] = torch.zeros(numel, dtype=dtype, device=self._engine.device)
        return held[:numel].view(shape)


def _check(engine: Any) -> None:
    """Raise UnsupportedError where boundaries cannot be compressed."""
    faults = [
        (
            not getattr(engine, "pipeline_parallelism", False),
            '"pipeline" in the "espresso" block or its plan, and a model that is no PipelineModule',
            "leave it out",
        ),
        (engine.device.type != "cpu", f"a pipeline on {engine.device.type}", "leave it out"),
        (
            getattr(engine, "fp16_enabled", bool)(),
            "a pipeline in fp16, whose loss scale feedback would have to follow",
            "use bf16",
        ),
    ]
    for present, what, fix in faults:
        if present:
            raise UnsupportedError(f"{what}: this cannot be done yet; {fix}")


def _ways(settings: PipelineSettings, stages: int) -> dict[tuple[int, Direction], Way]:
    """How tensors travel, by boundary and direction. Raises UnsupportedError and what the registry raises."""
    if extra := next((boundary for boundary in settings.boundaries if boundary >= stages - 1), None):
        raise UnsupportedError(f'"boundaries": {extra}, but {stages} stages have boundaries 0 to {stages - 2}; remove it')
    found: dict[tuple[int, Direction], Way] = {}
    for boundary in range(stages - 1):
        own = settings.boundaries.get(boundary, settings)
        for direction in DIRECTIONS:
            label, chosen = f"boundary {boundary} {direction}", getattr(own, direction)
            found[boundary, direction] = _way(label, chosen, settings.per_example, len(found))
    return found


def _way(label: str, chosen: CompressorSettings | None, per_example: bool, stream: int) -> Way:
    if chosen is None:
        return Way(label, None)
    mode = chosen.feedback or "none"
    if mode == "dgc":
        raise UnsupportedError(f'{label}: "feedback": "dgc" is the momentum of gradients; choose "ef", "ef21" or "none"')
    codec = registry.make(chosen.model_copy(update={"feedback": mode}))
    memory = Feedback(mode, getattr(torch, chosen.residual))
    return Way(label, codec, memory, per_example, chosen.seed + stream * 1_000_003)


def _channels(engine: Any, ways: Mapping[tuple[int, Direction], Way], timeout_s: float) -> dict[tuple[int, Direction], Any]:
    """This stage's ends of all directions. Collective: every rank makes every group."""
    stage, found = engine.stage_id, {}
    for ranks in engine.grid.pipe_groups:
        for (boundary, direction), way in ways.items():
            sides = ranks[boundary], ranks[boundary + 1]
            group = dist.new_group(list(sides), timedelta(seconds=timeout_s), "gloo")
            if dist.get_rank() in sides:
                sends = (stage == boundary) == (direction == "forward")
                found[boundary, direction] = (Outgoing if sends else Incoming)(way, group, timeout_s)
    return found


def _floats(engine: Any, kind: str, buffer_id: int) -> int:
    """Number of floating-point tensors of an instruction that hold values: DeepSpeed sends a mask as one more, cast to half."""
    if kind not in ("SendActivation", "RecvActivation"):
        return sys.maxsize
    tensors = engine.pipe_buffers["outputs"][buffer_id] if kind == "SendActivation" else engine.pipe_recv_buf
    if isinstance(tensors, Tensor):
        return 1
    masked = engine.has_attention_mask or engine.has_bool_tensors
    return sum(tensor.is_floating_point() for tensor in (tensors[:-1] if masked else tensors))


def _patch(p2p: Any) -> None:
    """Let DeepSpeed's p2p module ask for the instruction under way, once for all engines of the process."""
    if not hasattr(p2p.send, "espresso"):
        p2p.send, p2p.recv = _asking(p2p.send), _asking(p2p.recv)


def _asking(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(tensor: Tensor, stage: int, async_op: bool = False) -> Any:
        now = _current
        if now is None or not tensor.is_floating_point() or now.taken >= now.most():
            return original(tensor, stage, async_op)
        now.taken += 1
        if isinstance(now.channel, Outgoing):
            now.channel.send(tensor, now.taken - 1, torch.is_grad_enabled())
        else:
            now.channel.receive(tensor, now.taken - 1)
        return None

    vars(call)["espresso"] = True
    return call

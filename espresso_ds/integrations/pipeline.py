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
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ..core.config import EspressoBlock, PipelineSettings
from ..core.errors import MismatchError, UnsupportedError
from ..core.plan import read_block
from ..runtime import ways
from ..runtime.agree import Agreement, meet
from ..runtime.crossing import Incoming, Outgoing
from ..runtime.parcel import Way
from ..runtime.ways import Direction, Ways
from .example_numbers import ExampleNumbers
from .guarding import tell
from .pipeline_checkpoint import Checkpoints, warn_of_evaluation
from .plan_source import PIPELINE_BESIDE_PLAN, named_by_env

MEETING_S = 60.0
"""How long a rank waits for the others to hear of the block."""


@dataclass
class _Instruction:
    """A send or receive instruction under way: its channel, how many tensors the channel may take and has taken, and the numbers
    of the examples where they are known."""

    channel: Outgoing | Incoming
    most: Callable[[], int]
    examples: Tensor | None
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
    group = dist.new_group(backend="gloo")
    agreement = Agreement(group)
    found: Ways = {}
    block: EspressoBlock | None = None
    numbers: ExampleNumbers | None = None
    with agreement.collecting():
        block = read_block(config, where)
        assert block is not None and block.pipeline is not None
        if block.plan is not None or named_by_env():
            raise UnsupportedError(PIPELINE_BESIDE_PLAN)
        found, numbers = ways_of(engine, block.pipeline)
    agreement.settle({"pipeline": "" if block is None else repr(block.pipeline)})
    assert block is not None and block.pipeline is not None
    engine.espresso = compress_boundaries(engine, block.pipeline, found, numbers, block.timeout_s, group)


def ways_of(engine: Any, settings: PipelineSettings) -> tuple[Ways, ExampleNumbers | None]:
    """How tensors will travel, and the numbers of examples if AQ-SGD is among it.

    Raises:
        EspressoError: an engine or a codec for which this is not possible.
    """
    check_boundaries(engine)
    found = ways.make(settings, engine.num_stages)
    return found, ExampleNumbers(engine, settings.examples) if any(way.examples for way in found.values()) else None


def compress_boundaries(
    engine: Any, settings: PipelineSettings, found: Ways, numbers: ExampleNumbers | None, timeout_s: float, group: ProcessGroup
) -> PipelineAttachment:
    """Attach what `ways_of` found for these settings, and say so. Collective over all ranks; see `PipelineAttachment`."""
    attached = PipelineAttachment(engine, found, settings, numbers, timeout_s, group)
    tell("; ".join(["pipeline boundaries compressed", *(f"{way.label}: {way.kind}" for way in found.values())]))
    warn_of_evaluation(settings)
    return attached


class PipelineAttachment:
    """What `engine.espresso` holds for a PipelineEngine: the channels of this stage, and the way to take them off (`detach`).

    Args:
        engine: a PipelineEngine, fresh from `deepspeed.initialize`.
        found: how tensors travel, by boundary and direction; alike on all ranks.
        settings: what `found` was made from.
        numbers: of the examples, for AQ-SGD.
        timeout_s: deadline of every wait for another stage.
        group: a gloo group of all ranks.
    """

    def __init__(
        self,
        engine: Any,
        found: Ways,
        settings: PipelineSettings,
        numbers: ExampleNumbers | None,
        timeout_s: float,
        group: ProcessGroup,
    ) -> None:
        from deepspeed.runtime.pipe import p2p, schedule

        self.ways, self.evaluates = found, settings.evaluation == "as trained"
        self._engine, self._numbers = engine, numbers
        self._last_numbered = max((boundary for (boundary, _), way in found.items() if way.examples), default=-1)
        self._channels = _channels(engine, found, timeout_s)
        self._checkpoints = Checkpoints(engine, settings, self, group)
        _patch(p2p)
        kinds = {
            schedule.SendActivation: (engine.stage_id, "forward"),
            schedule.RecvActivation: (engine.stage_id - 1, "forward"),
            schedule.SendGrad: (engine.stage_id - 1, "backward"),
            schedule.RecvGrad: (engine.stage_id, "backward"),
        }
        ours = {kind: self._through(kind, place) for kind, place in kinds.items() if place in self._channels}
        if schedule.SendActivation in ours:
            forward = engine._INSTRUCTION_MAP[schedule.ForwardPass]
            passes = _sending_at_once(forward, ours[schedule.SendActivation], self._sends_at_once)
            ours |= dict(zip((schedule.ForwardPass, schedule.SendActivation), passes, strict=True))
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
        self._checkpoints.detach()
        if self._numbers is not None:
            self._numbers.detach()
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
            if not self._compresses():
                original(engine, *args, **kwargs)
                return
            sends = kind.__name__ == "SendActivation"
            examples = self._numbers.take() if sends and self._numbered(*place) and self._numbers is not None else None
            now = _current = _Instruction(channel, functools.partial(_floats, engine, kind.__name__, *args, **kwargs), examples)
            try:
                original(engine, *args, **kwargs)
            finally:
                _current = None
            if now.examples is not None and not sends and self._numbered(engine.stage_id, "forward"):
                assert self._numbers is not None
                self._numbers.add(now.examples)

        return instruction

    def _compresses(self) -> bool:
        """Whether what is under way, training or evaluation, goes through the channels."""
        return torch.is_grad_enabled() or self.evaluates

    def _sends_at_once(self) -> bool:
        return self._compresses() and not self._engine.is_grad_partitioned

    def _numbered(self, boundary: int, direction: Direction) -> bool:
        """Whether numbers of examples cross here: AQ-SGD is on this boundary, or needs them on a later one."""
        return direction == "forward" and boundary <= self._last_numbered and torch.is_grad_enabled()

    def state_dict(self) -> dict[str, object]:
        """What this stage's sides of the boundaries remember, for `load_state_dict` of the same stage. Between steps."""
        return {way.label: {**way.state_dict(), "messages": self._count(place)} for place, way in self._own()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. On all ranks. Raises MismatchError where it was made with other settings or stages."""
        own = {way.label: (place, way) for place, way in self._own()}
        if state.keys() != own.keys():
            raise MismatchError(
                f"the checkpoint remembers {', '.join(sorted(state)) or 'no boundaries'}, here are {', '.join(sorted(own))}; "
                "train with as many stages as before, or start without the saved memory"
            )
        for label, (place, way) in own.items():
            if state[label]["kind"] != way.kind:
                raise MismatchError(
                    f"{label}: the checkpoint was made with {state[label]['kind']}, this run has {way.kind}; "
                    "set it as it was, or start without the saved memory"
                )
            way.load_state_dict(state[label])
            channel = self._channels[place]
            if isinstance(channel, Outgoing):
                channel.sender.sent = state[label]["messages"]
            else:
                channel.received = state[label]["messages"]

    def forget(self) -> None:
        """Remember nothing, as at the start. On all ranks."""
        for _, way in self._own():
            way.forget()

    def _own(self) -> list[tuple[tuple[int, Direction], Way]]:
        return [(place, way) for place, way in self.ways.items() if place in self._channels]

    def _count(self, place: tuple[int, Direction]) -> int:
        channel = self._channels[place]
        return channel.sender.sent if isinstance(channel, Outgoing) else channel.received

    def _buffer(self, index: int, shape: list[int], dtype: torch.dtype) -> Tensor:
        """As DeepSpeed's, which forgets the dtype: it gives out a buffer of another one, and the stages wait for each other."""
        numel = 1
        for length in shape:
            numel *= length
        held = self._buffers.get((index, dtype))
        if held is None or held.numel() < numel:
            held = self._buffers[index, dtype] = torch.zeros(numel, dtype=dtype, device=self._engine.device)
        return held[:numel].view(shape)


def check_boundaries(engine: Any) -> None:
    """Raise UnsupportedError naming the first thing about the engine under which boundaries cannot be compressed."""
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
    from deepspeed.runtime.pipe.schedule import TrainSchedule

    kind = type(engine._train_schedule())
    if kind is not TrainSchedule:
        raise UnsupportedError(f"boundaries cannot be compressed under {kind.__name__} yet; train with TrainSchedule (1F1B)")


def _channels(engine: Any, ways: Ways, timeout_s: float) -> dict[tuple[int, Direction], Any]:
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


def _sending_at_once(
    forward: Callable[..., None], send: Callable[..., None], at_once: Callable[[], bool]
) -> tuple[Callable[..., None], Callable[..., None]]:
    """A forward pass whose activations leave as soon as they are there, and what is left of their send instruction.

    DeepSpeed's schedule has it wait for the gradients that come next, as a pair of blocking calls in step with the stage after.
    Nothing can wait in a circle: activations alone block, where they are integers, and stages take them in their order. Where
    gradients are partitioned their metadata block too: there the order stays DeepSpeed's.
    """
    sent: set[int] = set()

    @functools.wraps(forward)
    def forward_pass(engine: Any, buffer_id: int) -> None:
        forward(engine, buffer_id)
        if at_once():
            send(engine, buffer_id)
            sent.add(buffer_id)

    @functools.wraps(send)
    def send_activations(engine: Any, buffer_id: int) -> None:
        if buffer_id in sent:
            sent.remove(buffer_id)
        else:
            send(engine, buffer_id)

    return forward_pass, send_activations


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
            now.channel.send(tensor, now.taken - 1, torch.is_grad_enabled(), now.examples)
        else:
            now.examples = now.channel.receive(tensor, now.taken - 1)
        return None

    vars(call)["espresso"] = True
    return call

"""Attaching a plan to a DeepSpeed engine (ZeRO stage 0): hooks on the parameters, and a flush in place of the engine's allreduce.

Only instance attributes are set, so no class of DeepSpeed changes and other engines of the process are left alone.
"""

from __future__ import annotations

import atexit
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from .. import __version__
from ..compressors import registry
from ..compressors.powersgd import PowerSGD
from ..compressors.threads import use_threads
from ..core.chunks import chunk_lengths
from ..core.config import CompressorSettings
from ..core.errors import EspressoError, FileError, MismatchError, UnsupportedError
from ..core.memory import must_reverse
from ..core.option import Device, Level, Option
from ..core.plan import Plan
from ..feedback import Feedback
from ..feedback.low_rank import LowRankMemory
from ..runtime import groups, streams
from ..runtime.agree import Agreement, meet
from ..runtime.executor import Compressor, Executor, Unit, may_be_plain, unfit
from ..runtime.guard import Outcome
from ..runtime.lanes import Lanes
from ..runtime.low_rank import LowRankCompressor
from ..runtime.paths import Place
from ..runtime.plain import PLAIN
from ..runtime.synchroniser import Member, Scaling, Synchroniser
from ..runtime.trace import Recorder, run_trace, wanted_path
from .engine_facts import Layout, check_cluster, check_made_for, check_supported, cluster_kind, layout, timing_config, trainable
from .guarding import Guarding, guard_wanted, tell
from .optimizer_gradients import OptimizerGradients
from .plan_source import PIPELINE_BESIDE_PLAN, Source
from .settling import precision_of, settle_after_steps

MEETING_S = 60.0
"""How long a rank without a usable plan waits for the others to hear of it."""


def attach_plan(engine: Any, source: Source | None, fault: EspressoError | None) -> None:
    """Make `engine` synchronise its gradients as planned. Collective over all ranks.

    Args:
        engine: a DeepSpeedEngine, fresh from `deepspeed.initialize`.
        source: the plan, or None where this rank has none.
        fault: why this rank has no usable plan, to be raised on all ranks.

    Raises:
        EspressoError: the same one on every rank: a bad plan, one made for something else, an unsupported engine, or ranks that
            disagree.
    """
    control, agreement = hear_all(source, fault, functools.partial(check_supported, engine))
    assert source is not None
    hosts, kind = layout(), cluster_kind(engine)
    wanted = False
    with agreement.collecting():
        wanted = guard_wanted(source.block.guard)
        check_made_for(source.plan, engine, hosts.nodes, hosts.ranks_per_node, source.where)
        check_cluster(source.plan, kind, source.block.any_cluster, source.where)
        compressors = [compressor_of(settings, engine) for settings in source.plan.compressors]
        check_options(source.plan, compressors, timing_config(engine)["device"], hosts)
        trace_path = wanted_path(dist.get_rank())
    agreement.settle(_items(engine, source) | {"guard": str(source.block.guard) if wanted else "off"})
    tensors = [(tensor, Option.parse(tensor.option)) for tensor in source.plan.tensors]
    options = {option for _, option in tensors}
    compresses = any(option.compresses for option in options)
    guarded = wanted and any(option.compresses and may_be_plain(compressors[tensor.codec]) for tensor, option in tensors)
    place = Place(hosts.nodes, hosts.ranks_per_node, dist.get_rank())
    own = groups.make(place, options | ({PLAIN} if guarded else set()), dist.get_backend(), source.block.timeout_s)
    planned = Planned(source.plan, trainable(engine), own)
    engine.espresso = Attachment(engine, source, planned, compressors, trace_path, control if guarded else None)
    tell(banner(source, engine.espresso.buffer_nbytes))
    if wanted and compresses and not guarded:
        tell("guard: off, since uncompressed gradients would mean something else to the optimizer (DGC's momentum, signs)")


def hear_all(source: Source | None, fault: EspressoError | None, check: Callable[[], None]) -> tuple[ProcessGroup, Agreement]:
    """Meet all ranks, and go on only if each has a plan of the same kind and nothing to say against it. Collective.

    Args:
        source: the plan, or None where this rank has none.
        fault: why this rank has no usable plan.
        check: raises an EspressoError at what the plan cannot be carried out under.

    Returns:
        A gloo group of all ranks, and what collects further errors over it.

    Raises:
        EspressoError: the same one on every rank.
    """
    meet(source.block.timeout_s if source else MEETING_S)
    control = dist.new_group(backend="gloo")
    agreement = Agreement(control)
    with agreement.collecting():
        if fault is not None:
            raise fault
        if source is None:
            raise FileError("this rank has no plan while others have one; launch with `deepspeed --espresso_config plan.json`")
        check()
        if source.block.pipeline is not None:
            raise UnsupportedError(f"{source.where}: {PIPELINE_BESIDE_PLAN}")
    stages = source.plan.pipeline.stages if source is not None and source.plan.pipeline is not None else 1
    agreement.settle({"stages of the plan": str(stages)})
    return control, agreement


@dataclass(frozen=True)
class Planned:
    """What a rank synchronises, and with whom.

    Attributes:
        plan: the whole plan, or that of the rank's stage, made for the ranks of the stage.
        parameters: whose gradients the plan is for, by name.
        groups: of the ranks that share them.
    """

    plan: Plan
    parameters: dict[str, torch.nn.Parameter]
    groups: groups.Groups


class Attachment:
    """What `engine.espresso` holds: the running synchroniser and the way to take it off again (`detach`).

    `feedback` has the residuals: one memory for each of the plan's compressors. `recorder` has the spans of the last steps.
    `guard` says what the guard found: None before its verdict, and where there is none. `kept` knows where gradients are.

    Args:
        engine: a DeepSpeedEngine for which the plan was checked.
        source: the plan and the block it stands in.
        planned: what of it is this rank's.
        compressors: one for each of the plan's.
        trace_path: where this rank's run trace goes in the end, if anywhere.
        control: a gloo group of all ranks, for the guard; None to trust the plan.
        synchronises: whether the gradients of a backward pass are synchronised now; None: where the engine accumulates no more.
    """

    def __init__(
        self,
        engine: Any,
        source: Source,
        planned: Planned,
        compressors: Sequence[Compressor | LowRankCompressor],
        trace_path: Path | None = None,
        control: ProcessGroup | None = None,
        synchronises: Callable[[], bool] | None = None,
    ) -> None:
        plan, timeout_s = planned.plan, source.block.timeout_s
        device = next(iter(planned.parameters.values())).device
        self.kept = OptimizerGradients(engine)
        units = _units(plan, planned.parameters, self.kept)
        chunks = [chunk for chunks, _ in units for chunk in chunks]
        self._groups = planned.groups
        self.feedback = [compressor.feedback for compressor in compressors]
        steps = max(chunk.steps for chunk in chunks)
        wire_dtype = engine.communication_data_type
        self.recorder = Recorder(steps + 1, len(chunks))
        self._executor = Executor(
            chunks, compressors, self._groups, wire_dtype, device, self.recorder, guarded=control is not None
        )
        use_threads(device.type, source.plan.made_for.ranks_per_node)
        self._lanes = Lanes(steps, timeout_s, functools.partial(streams.enter_lane, device))
        self.synchroniser = Synchroniser(units, self._executor, self._lanes, scaling_of(engine), wire_dtype, self.recorder)
        self.guarding: Guarding | None = None
        if control is not None:
            measuring = self.synchroniser, self.recorder, control, timeout_s, device
            self.guarding = Guarding(source.block.guard, plan, *measuring)
        self.plan = plan
        self._rank, self._device = dist.get_rank(), device.type
        self._trace_path = trace_path
        self._engine = engine
        self._trained = [(name, param, param.requires_grad) for name, param in engine.module.named_parameters()]
        self._synchronises = synchronises or self._at_boundary
        self._hooks = [
            param.register_post_accumulate_grad_hook(functools.partial(self._ready, name))  # after the optimizer's own
            for name, param in planned.parameters.items()
        ]
        engine.buffered_allreduce_fallback = self._flush
        self._backward, engine.backward = engine.backward, self._timed_backward
        self._leave_steps = settle_after_steps(engine, self.feedback, self._executor.committed)
        atexit.register(self.detach)

    @property
    def buffer_nbytes(self) -> int:
        """Bytes that this rank keeps for synchronising beside the gradients and the memory of feedback."""
        return self._executor.buffer_nbytes + self.synchroniser.buffer_nbytes + self.recorder.nbytes

    @property
    def guard(self) -> Outcome | None:
        """What the guard found; None before its verdict, or without one."""
        return None if self.guarding is None else self.guarding.outcome

    def save_trace(self, path: str | Path) -> None:
        """Write this rank's last planned steps for `espresso compare`; call it between steps.

        Raises:
            FileError: no such directory.
        """
        off_plan = frozenset[int]() if self.guarding is None else self.guarding.guard.steps_off_plan
        about = {"device": self._device, "made_by": f"espresso_ds {__version__}"}
        run_trace(self.recorder, self.plan, rank=self._rank, off_plan=off_plan, **about).save(path)

    def detach(self) -> None:
        """Give the engine back its own allreduce, stop the lanes, and write the run trace that was asked for."""
        atexit.unregister(self.detach)
        for hook in self._hooks:
            hook.remove()
        for name in ("buffered_allreduce_fallback", "backward"):
            self._engine.__dict__.pop(name, None)
        self._leave_steps()
        self._lanes.close()
        if self.guarding is not None:
            self.guarding.close()
        self._groups.close(destroy=dist.is_initialized())
        if self._trace_path is not None:
            self.save_trace(self._trace_path)

    def _timed_backward(self, *args: Any, **kwargs: Any) -> Any:
        if self._synchronises():
            self.synchroniser.begin()
            if self.guarding is not None:
                self.guarding.begin()
        return self._backward(*args, **kwargs)

    def _at_boundary(self) -> bool:
        return self._engine.is_gradient_accumulation_boundary() and not self._engine.inside_no_sync_ctxt

    def _ready(self, name: str, param: torch.nn.Parameter) -> None:
        if self._synchronises():
            self.kept.take(param)
            self.synchroniser.ready(name)

    def _flush(self, grads: object = None, elements_per_buffer: int = 0) -> None:
        if grads is not None:
            raise UnsupportedError(
                "buffered_allreduce_fallback was called with gradients of its own; a plan holds for the model's gradients only"
            )
        self._check_trained()
        if self.guarding is None:
            self.synchroniser.flush()
        else:
            self.guarding.flush()

    def _check_trained(self) -> None:
        """Raise UnsupportedError where other parameters are trained than at start, for which the plan has decided."""
        for name, param, was in self._trained:
            if param.requires_grad != was:
                raise UnsupportedError(
                    f"{name} was {'frozen' if was else 'unfrozen'} after deepspeed.initialize, and the plan is for what was "
                    "trained then: set requires_grad before, and plan for that (`espresso prepare`), or run without the plan "
                    "(ESPRESSO_DISABLE=1)"
                )


def scaling_of(engine: Any) -> Scaling:
    """DeepSpeed's factors before and after the sum over ranks (`allreduce_bucket`): mean or sum, prescale, predivide."""
    world = engine.dp_world_size
    if not engine.gradient_average:
        return Scaling(1.0, 1.0)
    if not engine.postscale_gradients():
        return Scaling(1.0 / world, 1.0)
    predivide = engine.gradient_predivide_factor()
    return Scaling(1.0 / predivide, predivide / world)


def _units(
    plan: Plan, parameters: dict[str, torch.nn.Parameter], kept: OptimizerGradients
) -> list[tuple[list[Unit], list[Member]]]:
    """The plan's units, large compressed ones in chunks, each with its parameters."""
    units, index = [], itertools.count()
    for tensors in plan.units():
        option = Option.parse(tensors[0].option)
        label = tensors[0].name if len(tensors) == 1 else f"{tensors[0].name} (+{len(tensors) - 1})"
        numel = sum(tensor.numel for tensor in tensors)
        lengths = chunk_lengths(numel, tensors[0].chunk_numel if option.compresses else None, plan.made_for.world_size)
        labels = [label] if len(lengths) == 1 else [f"{label} [{place}]" for place in range(len(lengths))]
        codec = tensors[0].codec
        shapes = tuple(tensor.shape for tensor in tensors)
        chunks = [Unit(next(index), text, length, option, codec, shapes) for text, length in zip(labels, lengths, strict=True)]
        params = [parameters[tensor.name] for tensor in tensors]
        members = [Member(t.name, param, t.firings, kept.of(param)) for t, param in zip(tensors, params, strict=True)]
        units.append((chunks, members))
    return units


def compressor_of(settings: CompressorSettings, engine: Any) -> Compressor | LowRankCompressor:
    """A codec with its memory, as `engine` needs it."""
    dtype, precision = getattr(torch, settings.residual), precision_of(engine)
    if settings.name == PowerSGD.name:
        mode = settings.feedback or "ef"
        low_rank = LowRankMemory(mode, dtype, must_reverse(mode, precision))
        return LowRankCompressor(PowerSGD.of(settings), low_rank, settings.seed)
    settings = registry.resolve(settings)
    assert settings.feedback is not None
    memory = Feedback(
        settings.feedback,
        dtype,
        momentum=settings.momentum,
        clip=settings.clip,  # what is compressed is scaled before: its sum is the result
        world_size=engine.dp_world_size,
        reversible=must_reverse(settings.feedback, precision),
    )
    return Compressor(registry.make(settings), memory, settings.seed)


def check_options(
    plan: Plan, compressors: Sequence[Compressor | LowRankCompressor], device: str | int | float | bool, hosts: Layout
) -> None:
    """Raise FileError or MismatchError at the first tensor whose option its codec, this device or these ranks cannot do."""
    for tensor in plan.tensors:
        option, compressor = Option.parse(tensor.option), compressors[tensor.codec]
        if why := unfit(compressor.codec, option, compressor.feedback.mode):
            raise FileError(f"{tensor.name}: option {option} is wrong for {compressor.codec.name}: {why}; plan again")
        if option.low_rank and tensor.chunk_numel is not None:
            raise FileError(f"{tensor.name}: option {option} factors whole matrices; remove chunk_numel ({tensor.chunk_numel})")
        if option.levels != {Level.FLAT} and not hosts.in_order:
            raise MismatchError(
                f"{tensor.name}: option {option} works inside and between hosts, but the ranks of a host do not follow each "
                "other (such as with `mpirun --map-by node`), or replicas of a pipeline stage lie unevenly on hosts; place them "
                'host by host, or set "constraints": {"flat_only": true} and plan again'
            )
        if device == "cpu" and any(action.at is Device.GPU for action in option.actions):
            raise FileError(f"{tensor.name}: option {option} compresses on a GPU, but the model computes on the CPU; plan again")


def _items(engine: Any, source: Source) -> dict[str, str]:
    """What all ranks must hold alike, in order."""
    items = {"plan seal": source.plan.seal, "timeout_s": str(source.block.timeout_s), "scaling": str(scaling_of(engine))}
    items |= {key: str(value) for key, value in timing_config(engine).items()}
    for position, (name, param) in enumerate(trainable(engine).items()):
        items[f"parameter {position}"] = f"{name} {list(param.shape)} {param.dtype}"
    return items


def banner(source: Source, buffer_nbytes: int) -> str:
    """The start of a run in one line, for people."""
    plan = source.plan
    used = Counter(tensor.codec for tensor in plan.tensors if Option.parse(tensor.option).compresses)
    codecs = "; ".join(f"{count} with {plan.compressors[codec].label}" for codec, count in sorted(used.items()))
    predicted = plan.predicted
    feedback = "" if plan.step is None else f" and up to {plan.step.feedback_bytes / 1e6:.1f} MB of error feedback"
    return (
        f"plan active ({source.where}): {used.total()} of {len(plan.tensors)} tensors compressed"
        f"{f' ({codecs})' if codecs else ''}, "
        f"{predicted.planned_bytes / 1e6:.2f} MB sent per rank and step instead of {predicted.uncompressed_bytes / 1e6:.2f} MB, "
        f"expected step {predicted.planned_s:.3f} s (DeepSpeed alone: {predicted.stock_s:.3f} s), "
        f"{buffer_nbytes / 1e6:.1f} MB of buffers{feedback} on this rank"
    )

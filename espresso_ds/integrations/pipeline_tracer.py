"""`espresso trace` of a PipelineModule: times the passes of every stage, counts what crosses, writes the trace, ends the script.

Messages go DeepSpeed's own way meanwhile, and its replicas are synchronised; neither is timed.
"""

from __future__ import annotations

import functools
import os
import socket
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..core.profile import ModelTrace, PipelineTrace, TracedBoundary, TracedStage, TracedTensor
from .engine_facts import dtype_name, layout, timing_config
from .pipeline import check_boundaries
from .stage_facts import untied
from .tracing import WARM_UP, Tracing


@dataclass
class _Seen:
    """What one rank saw: seconds of passes and of what follows them by step, seconds until gradients were ready in last backward
    passes and how often each became so in a pass, elements of tensors that left."""

    forward_s: list[list[float]] = field(default_factory=list)
    backward_s: list[list[float]] = field(default_factory=list)
    after_s: list[float] = field(default_factory=list)
    ready_s: list[dict[str, float]] = field(default_factory=list)
    firings: dict[str, int] = field(default_factory=dict)
    numel: dict[str, tuple[int, ...]] = field(default_factory=dict)
    element_bytes: int = 4
    examples: int = 1


def attach_pipeline_tracer(engine: Any) -> None:
    """Time `engine`'s next steps. Collective. Raises UnsupportedError on every rank where its boundaries cannot be compressed."""
    _PipelineTracer(engine, Tracing(lambda: check_boundaries(engine)))


class _PipelineTracer:
    def __init__(self, engine: Any, tracing: Tracing) -> None:
        from deepspeed.runtime.pipe import schedule

        self._engine, self._tracing = engine, tracing
        self._ranks_per_node = layout().ranks_per_node
        self._parameters = untied(engine)
        self._seen, self._backward_begun = _Seen(), 0.0
        self._ready: dict[str, float] = {}
        self._fired: Counter[str] = Counter()
        for name, parameter in self._parameters.items():
            parameter.register_post_accumulate_grad_hook(functools.partial(self._is_ready, name))
        given = engine._INSTRUCTION_MAP
        engine._INSTRUCTION_MAP = {
            **given,
            schedule.ForwardPass: self._timed(given[schedule.ForwardPass], self._seen.forward_s),
            schedule.BackwardPass: self._timed(given[schedule.BackwardPass], self._seen.backward_s),
            schedule.ReduceGrads: self._reducing(given[schedule.ReduceGrads]),
            schedule.SendActivation: self._counted(given[schedule.SendActivation], "forward", "outputs", lambda t: t),
            schedule.SendGrad: self._counted(given[schedule.SendGrad], "backward", "inputs", lambda t: t.grad),
        }
        self._passed = 0.0
        self._schedule, engine._exec_schedule = engine._exec_schedule, self._exec
        self._step_begins()

    def _step_begins(self) -> None:
        self._seen.forward_s.append([])
        self._seen.backward_s.append([])
        self._reduced_s = 0.0

    def _exec(self, schedule: Any) -> None:
        """A training step: what has passed since the last one's passes ended was its after_s, but for synchronising replicas."""
        if torch.is_grad_enabled() and self._passed:
            self._seen.after_s.append(time.perf_counter() - self._passed - self._reduced_s)
            self._seen.ready_s.append(dict(self._ready))
            if self._tracing.was_last(len(self._seen.after_s)):
                tensors = [(name, tuple(p.shape), dtype_name(p.dtype)) for name, p in self._parameters.items()]
                self._tracing.end((self._engine.stage_id, socket.gethostname(), self._seen, tensors), self._trace)
            self._step_begins()
        self._schedule(schedule)

    def _reducing(self, original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def instruction(engine: Any, *args: Any, **kwargs: Any) -> None:
            start = time.perf_counter()
            original(engine, *args, **kwargs)
            self._reduced_s = time.perf_counter() - start

        return instruction

    def _timed(self, original: Callable[..., None], into: list[list[float]]) -> Callable[..., None]:
        @functools.wraps(original)
        def instruction(engine: Any, *args: Any, **kwargs: Any) -> None:
            self._fired.clear()
            start = self._backward_begun = time.perf_counter()
            original(engine, *args, **kwargs)
            if torch.is_grad_enabled():
                self._passed = time.perf_counter()
                into[-1].append(self._passed - start)

        return instruction

    def _counted(
        self, original: Callable[..., None], direction: str, buffer: str, of: Callable[[Tensor], Tensor | None]
    ) -> Callable[..., None]:
        @functools.wraps(original)
        def instruction(engine: Any, buffer_id: int) -> None:
            held = engine.pipe_buffers[buffer][buffer_id]
            sent = [each for each in map(of, held if isinstance(held, tuple) else (held,)) if each is not None]
            floats = [each for each in sent if each.is_floating_point()]
            self._seen.numel[direction] = tuple(each.numel() for each in floats)
            self._seen.element_bytes = max((each.element_size() for each in floats), default=4)
            self._seen.examples = max((len(each) for each in floats if each.dim() > 1), default=1)
            original(engine, buffer_id)

        return instruction

    def _is_ready(self, name: str, _: torch.nn.Parameter) -> None:
        self._ready[name] = time.perf_counter() - self._backward_begun  # the last micro-batch's stays
        self._fired[name] += 1
        self._seen.firings[name] = max(self._seen.firings.get(name, 1), self._fired[name])

    def _trace(self, ranks: list[tuple[int, str, _Seen, list[tuple[str, tuple[int, ...], str]]]]) -> ModelTrace:
        engine = self._engine
        hosts = list(dict.fromkeys(host for _, host, _, _ in ranks))
        stages, boundaries, tensors = [], [], []
        # All stages go on together after the one that is done last, and only of that one what follows is no waiting.
        after_s = min(statistics.median(each.after_s[WARM_UP:]) for _, _, each, _ in ranks)
        for stage in range(engine.num_stages):
            replicas = [each for each in ranks if each[0] == stage]
            seen = [each for _, _, each, _ in replicas]
            backward_s = max(_median(each.backward_s[WARM_UP:]) for each in seen)
            own = sorted(_tensors(seen, replicas[0][3], backward_s), key=lambda tensor: tensor.ready_s)
            tensors += own
            stages.append(
                TracedStage(
                    host=hosts.index(replicas[0][1]),
                    forward_s=max(_median(each.forward_s[WARM_UP:]) for each in seen),
                    backward_s=backward_s,
                    after_s=after_s,
                    tensors=len(own),
                )
            )
            if stage > 0:
                before = next(each for at, _, each, _ in ranks if at == stage - 1)
                boundaries.append(
                    TracedBoundary(
                        forward_numel=before.numel["forward"],
                        backward_numel=seen[0].numel.get("backward", ()),
                        element_bytes=before.element_bytes,
                        examples=before.examples,
                    )
                )
        slowest = max(stages, key=lambda stage: stage.forward_s + stage.backward_s)
        passes = engine.micro_batches + engine.num_stages - 1
        return ModelTrace(
            model=type(engine.module).__name__,
            device="cpu",
            world_size=dist.get_world_size(),
            ranks_per_node=self._ranks_per_node,
            threads=torch.get_num_threads(),
            cores=len(os.sched_getaffinity(0)),
            steps=self._tracing.steps,
            config=timing_config(engine),
            wire_dtype=dtype_name(engine.communication_data_type),
            forward_s=passes * (slowest.forward_s + slowest.backward_s) - slowest.backward_s,
            backward_s=slowest.backward_s,
            after_s=max(stage.after_s for stage in stages),
            tensors=tuple(tensors),
            pipeline=PipelineTrace(micro_batches=engine.micro_batches, stages=tuple(stages), boundaries=tuple(boundaries)),
        )


def _tensors(seen: list[_Seen], parameters: list[tuple[str, tuple[int, ...], str]], backward_s: float) -> list[TracedTensor]:
    """A stage's gradients, ready within `backward_s`: of each step the slowest replica counts, as all wait for it."""
    found = []
    for name, shape, dtype in parameters:
        by_step = zip(*(each.ready_s[WARM_UP:] for each in seen), strict=True)
        ready_s = min(backward_s, statistics.median(max(ready.get(name, 0.0) for ready in step) for step in by_step))
        numel = torch.Size(shape).numel()
        firings = max(each.firings.get(name, 1) for each in seen)
        found.append(TracedTensor(name=name, shape=shape, dtype=dtype, numel=numel, ready_s=ready_s, firings=firings))
    return found


def _median(steps: list[list[float]]) -> float:
    return statistics.median(seconds for step in steps for seconds in step)

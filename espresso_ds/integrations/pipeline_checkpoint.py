"""Checkpoints of a PipelineEngine with compressed boundaries: what they remember, and the rule that the model was trained with.

Beside DeepSpeed's files in the folder of the tag: `espresso_pipeline.json`, the "pipeline" settings, and for each rank
`espresso_pipeline_rank0.pt` with the memory of its sides of the boundaries. Both are there before DeepSpeed names the
checkpoint the latest one. The settings go with the weights, also where `save_state_dict` of the PipelineModule saves these alone.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from ..core.config import CompressorSettings, PipelineSettings
from ..core.errors import EspressoError, FileError, MismatchError
from ..core.record import load_json, write_json
from ..runtime import ways
from ..runtime.agree import Agreement
from .guarding import tell

RULE = "espresso_pipeline.json"
_MEMORY = "espresso_pipeline_rank{}.pt"
_OF_WEIGHTS = ("save_state_dict", "load_state_dir")


class Remembers(Protocol):
    """What has memory of boundaries."""

    def state_dict(self) -> dict[str, object]:
        """All of it."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from it."""

    def forget(self) -> None:
        """Start anew."""


class Checkpoints:
    """Makes an engine's `save_checkpoint` and `load_checkpoint` take the boundaries along.

    Args:
        engine: a PipelineEngine.
        settings: of its boundaries.
        memory: of this rank.
        group: a gloo group of all ranks.
    """

    def __init__(self, engine: Any, settings: PipelineSettings, memory: Remembers, group: ProcessGroup) -> None:
        self._engine, self._settings, self._memory = engine, settings, memory
        self._group: ProcessGroup | None = group
        self._save, self._load = engine.save_checkpoint, engine.load_checkpoint
        engine.save_checkpoint = self._saving
        engine.load_checkpoint = self._loading
        carry_rule(engine.module, settings)

    def detach(self) -> None:
        """Give the engine its own methods back, and let go of the group, whose threads must not outlive the interpreter."""
        self._group = None
        for owner, names in ((self._engine, ("save_checkpoint", "load_checkpoint")), (self._engine.module, _OF_WEIGHTS)):
            for name in names:
                vars(owner).pop(name, None)

    def _saving(self, save_dir: str, tag: str | None = None, *args: Any, **kwargs: Any) -> Any:
        folder = Path(save_dir) / str(f"global_step{self._engine.global_steps}" if tag is None else tag)
        dist.barrier(group=self._group)  # who is here has taken all that was sent to it, so nothing waits in any channel
        with self._alike():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                torch.save({"of": self._place(), **self._memory.state_dict()}, folder / _MEMORY.format(dist.get_rank()))
                _write_rule(folder, self._settings)
            except (OSError, RuntimeError) as error:
                raise FileError(f"{folder}: cannot write what boundaries remember: {error}") from None
        return self._save(save_dir, tag, *args, **kwargs)

    def _loading(self, load_dir: str, *args: Any, **kwargs: Any) -> Any:
        result = self._load(load_dir, *args, **kwargs)
        if result[0] is None:
            return result
        folder = Path(result[0]).parent
        asked = inspect.signature(self._load).bind(load_dir, *args, **kwargs).arguments
        whole = not asked.get("load_module_only") and asked.get("load_optimizer_states", True)
        path = folder / _MEMORY.format(dist.get_rank())
        told = [False] * dist.get_world_size()
        dist.all_gather_object(told, path.exists(), group=self._group)
        if not whole or not any(told):
            self._memory.forget()
            if whole:
                tell(f"warning: {folder} has no memory of boundaries; they start with none")
            return result
        with self._alike():
            if not path.exists():
                raise FileError(
                    f"{path}: no such memory of boundaries, though other ranks have theirs; copy all files of the folder"
                )
            state = torch.load(path, weights_only=True)
            if (of := state.pop("of", "another version of espresso_ds")) != (here := self._place()):
                raise MismatchError(
                    f"{path} is of {of}, this is {here}, which has other things to remember; train with as many stages and "
                    "replicas as before, or delete the espresso_pipeline_rank*.pt of the folder to start without memory"
                )
            self._memory.load_state_dict(state)
        return result

    def _place(self) -> str:
        engine = self._engine
        replica = engine.grid.get_data_parallel_id()
        return f"stage {engine.stage_id} of {engine.num_stages}, replica {replica} of {engine.dp_world_size}"

    @contextmanager
    def _alike(self) -> Iterator[None]:
        """What fails on one rank stops all of them with the same error."""
        assert self._group is not None
        agreement = Agreement(self._group)
        with agreement.collecting():
            yield
        agreement.settle()


def keeps_only_some(settings: PipelineSettings) -> str | None:
    """The forward codec that sends only some activations and forgets the others, for people; None where there is none.

    With memory (EF, EF21, AQ-SGD) a model learns from the others as well, and is nearly as good with all of them.
    """
    every = _of_activations(settings)
    return next((codec.label for codec in every if codec.density is not None and codec.feedback in (None, "none")), None)


def _of_activations(settings: PipelineSettings) -> Iterator[CompressorSettings]:
    for each in (settings, *settings.boundaries.values()):
        if each.forward is not None:
            yield each.forward


def warn_of_evaluation(settings: PipelineSettings) -> None:
    """Say so at the start of a run whose model will be evaluated with activations it has not learnt from."""
    strong = keeps_only_some(settings)
    if settings.evaluation == "uncompressed" and strong:
        tell(
            f'warning: "evaluation": "uncompressed", but a model that is trained with {strong} has learnt to do without '
            "the rest of its activations, and is usually worse with them"
        )
    remembering = next((codec.label for codec in _of_activations(settings) if codec.feedback == "aqsgd"), None)
    if settings.evaluation == "as trained" and remembering:
        tell(
            f'warning: "evaluation": "as trained", but {remembering} remembers examples of training alone: others are sent '
            'without memory, and the model is usually worse than it was trained; set "evaluation": "uncompressed"'
        )


def warn_of_other_rule(folder: Path, settings: PipelineSettings | None) -> None:
    """Say so where a checkpoint's model was trained with other activations than this run's, which matters for what it has learnt.

    Args:
        folder: of the checkpoint's tag.
        settings: this run's; None: nothing is compressed.
    """
    if not (folder / RULE).exists():
        return
    try:
        trained = PipelineSettings.read(load_json(folder / RULE, "pipeline rule", "engine.save_checkpoint"), str(folder / RULE))
    except EspressoError as error:
        tell(f"warning: {error}")
        return
    strong = keeps_only_some(trained)
    if strong and (settings is None or keeps_only_some(settings) is None):
        tell(
            f"warning: the model in {folder} was trained with {strong} between its stages, and this run sends all activations: "
            "it has learnt to do without the rest of them, and is usually worse with them; to compress as in training, put the "
            f'content of {RULE} into the "espresso" block as "pipeline"'
        )
    elif settings is not None and _forward(trained) != _forward(settings):
        tell(f"warning: the model in {folder} was trained with other codecs of activations than this run's: see {RULE} there")


def _forward(settings: PipelineSettings) -> object:
    shared = settings.forward, settings.per_example
    return shared, {boundary: ways.of_boundary(settings, boundary).forward for boundary in settings.boundaries}


def _write_rule(folder: Path, settings: PipelineSettings) -> None:
    """Put the rule beside the weights, on rank 0. A checkpoint has it before DeepSpeed's files: what fails stops all ranks."""
    if dist.get_rank() == 0:
        write_json(folder / RULE, settings.model_dump(mode="json", exclude_none=True))


def carry_rule(module: Any, settings: PipelineSettings | None) -> None:
    """Let a PipelineModule's weights carry the rule they were trained with, in checkpoints and in exports, and tell when it loads
    others; with None, for boundaries that are not compressed, the latter alone."""
    save, load = module.save_state_dict, module.load_state_dir

    @functools.wraps(save)
    def saving(save_dir: str, *args: Any, **kwargs: Any) -> None:
        save(save_dir, *args, **kwargs)
        if settings is not None:
            _write_rule(Path(save_dir), settings)

    @functools.wraps(load)
    def loading(load_dir: str, *args: Any, **kwargs: Any) -> None:
        load(load_dir, *args, **kwargs)
        warn_of_other_rule(Path(load_dir), settings)

    module.save_state_dict, module.load_state_dir = saving, loading

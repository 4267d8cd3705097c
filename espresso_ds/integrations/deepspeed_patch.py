"""What changes in DeepSpeed when it is imported: its launcher learns `--espresso_config`, and `initialize` applies the plan.

Three places, all public: `deepspeed.launcher.runner.parse_args`, `MultiNodeRunner.add_export` and `deepspeed.initialize`.
Standard library only, since every process that imports deepspeed comes through here; all else is imported when a plan is there.
"""

from __future__ import annotations

import argparse
import functools
import os
import shlex
import sys
from collections.abc import Callable
from itertools import pairwise
from types import ModuleType
from typing import Any

FLAG = "--espresso_config"
ENV_PREFIX = "ESPRESSO"
_LAUNCHER = "deepspeed.launcher.runner"


def imported(module: ModuleType) -> None:
    """Called once for each watched module, right after it has been executed."""
    if module.__name__ == _LAUNCHER:
        module.parse_args = _with_flag(module.parse_args)
        _export_ours(module)
    elif module.__name__ == "deepspeed":
        module.initialize = _with_plan(module.initialize)
        if _is_launcher_main():
            _patch_main_launcher()


def _with_flag(parse_args: Callable[..., argparse.Namespace]) -> Callable[..., argparse.Namespace]:
    @functools.wraps(parse_args)
    def parse(args: list[str] | None = None) -> argparse.Namespace:
        with _FlagInParser():
            parsed = parse_args(args)
        _export_plan(parsed)
        return parsed

    return parse


class _FlagInParser:
    """While active, ArgumentParsers get our flag before they parse: argparse itself tells launcher flags from script flags."""

    def __enter__(self) -> None:
        self._original = original = argparse.ArgumentParser.parse_args

        def parse_args(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
            add_flag(parser)
            return original(parser, *args, **kwargs)

        argparse.ArgumentParser.parse_args = parse_args

    def __exit__(self, *_: object) -> None:
        argparse.ArgumentParser.parse_args = self._original


def add_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--espresso_config` to a launcher's parser."""
    parser.add_argument(FLAG, metavar="PLAN.JSON", help="plan of espresso_ds (from `espresso prepare`) to apply to every worker")


def _export_plan(parsed: argparse.Namespace) -> None:
    if getattr(parsed, "espresso_config", None) is None:
        return
    from ..core.errors import EspressoError
    from .plan_source import export_plan

    try:
        export_plan(parsed.espresso_config, parsed.launcher.lower())
    except EspressoError as error:
        sys.exit(f"espresso: {error}")


def _export_ours(launcher: ModuleType) -> None:
    """Let our variables reach the other hosts as they are: DeepSpeed quotes values, and only pdsh's shell removes the quotes."""
    if ENV_PREFIX in launcher.EXPORT_ENVS:
        return
    launcher.EXPORT_ENVS.append(ENV_PREFIX)  # a list of prefixes of names
    runner = sys.modules["deepspeed.launcher.multinode_runner"].MultiNodeRunner
    original = runner.add_export

    @functools.wraps(original)
    def add_export(self: Any, key: str, value: str) -> None:
        key, value = key.strip(), value.rstrip("\r\n")  # lines of .deepspeed_env come whole
        if not key.startswith(ENV_PREFIX):
            original(self, key, value)
        elif self.name == "pdsh":
            self.exports[key] = shlex.quote(value).replace("%", "%%")  # pdsh replaces %h, %n and the like by the host's
        elif self.name != "slurm":
            self.exports[key] = value
        elif os.environ.get(key) != value:  # what is in the environment comes with srun --export=ALL,KEY=VALUE,...
            if "," in value:
                sys.exit(f"espresso: srun would split {key}={value} of .deepspeed_env at its comma; set it in the environment")
            self.exports[key] = value

    runner.add_export = add_export


def _is_launcher_main() -> bool:
    words = sys.orig_argv
    return ("-m", _LAUNCHER) in pairwise(words)


def _patch_main_launcher() -> None:
    """`python -m deepspeed.launcher.runner` runs that file without importing it, so its parser is known by its description."""
    original = argparse.ArgumentParser.parse_args

    def parse_args(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        if not (parser.description or "").startswith("DeepSpeed runner"):
            return original(parser, *args, **kwargs)
        argparse.ArgumentParser.parse_args = original
        add_flag(parser)
        parsed = original(parser, *args, **kwargs)
        _export_plan(parsed)
        _export_ours(sys.modules["__main__"])
        return parsed

    argparse.ArgumentParser.parse_args = parse_args


def _with_plan(initialize: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(initialize)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        from .initialize import initialize_with_plan, wanted

        if not wanted(initialize, args, kwargs):
            return _warned(initialize(*args, **kwargs))
        return initialize_with_plan(initialize, args, kwargs)

    return wrapped


def _warned(made: Any) -> Any:
    """An engine of pipeline stages without us tells when it loads a model that was trained with compressed activations."""
    if getattr(made[0], "pipeline_parallelism", False):
        from .pipeline_checkpoint import carry_rule

        carry_rule(made[0].module, None)
    return made

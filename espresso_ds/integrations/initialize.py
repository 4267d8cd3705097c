"""`deepspeed.initialize` with a plan, or with the tracer: decides whether we act at all, then attaches to the finished engine."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from .plan_source import DISABLE_ENV, PATH_ENV, PLAN_ENV, Source

TRACE_ENV = "ESPRESSO_TRACE_OUT"
TRACE_CONFIG_ENV = "ESPRESSO_TRACE_CONFIG"
BLOCK = "espresso"


def wanted(initialize: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]) -> bool:
    """Whether this call has a plan, a block or a tracer. If not, DeepSpeed must run as if we did not exist."""
    if os.environ.get(TRACE_ENV) or os.environ.get(PLAN_ENV) or os.environ.get(PATH_ENV):
        return True
    config, _ = _script_config(_bound(initialize, args, kwargs))
    return config is not None and BLOCK in config


def initialize_with_plan(initialize: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """Call `initialize`, then attach the plan (or the tracer) to its engine.

    Raises:
        EspressoError: the same one on every rank, before the first step.
    """
    from ..core.errors import EspressoError, FileError
    from . import plan_source

    call = _bound(initialize, args, kwargs)
    config, where = _script_config(call)
    source: Source | None = None
    fault: EspressoError | None = None
    tracing = bool(os.environ.get(TRACE_ENV))
    if tracing:
        if config is None and os.environ.get(TRACE_CONFIG_ENV):
            config = call.arguments["config"] = os.environ[TRACE_CONFIG_ENV]
    else:
        try:
            source = plan_source.choose(plan_source.from_env(), config, where)
        except EspressoError as error:
            fault = error  # raised after initialize, where all ranks can hear of it
    if config is None:
        if source is None:
            raise fault or FileError("no DeepSpeed config: give one to deepspeed.initialize, or a plan with --espresso_config")
        call.arguments["config"] = dict(source.ds_config)
    result = initialize(*call.args, **call.kwargs)
    engine = result[0]
    if tracing:
        from .tracer import attach_tracer

        attach_tracer(engine)
    elif _disabled(config):
        print("espresso: disabled by the user: DeepSpeed runs as if there were no plan", file=sys.stderr, flush=True)
    elif source is not None or fault is not None:
        from .engine import attach_plan

        attach_plan(engine, source, fault)
    return result


def _disabled(config: dict[str, Any] | None) -> bool:
    block = (config or {}).get(BLOCK)
    return os.environ.get(DISABLE_ENV, "0") not in ("", "0") or (isinstance(block, dict) and block.get("enabled") is False)


def _bound(initialize: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
    return inspect.signature(initialize).bind_partial(*args, **kwargs)


def _script_config(call: inspect.BoundArguments) -> tuple[dict[str, Any] | None, str]:
    """The config that DeepSpeed would find in this call, decoded by DeepSpeed's own reader, and its name for messages."""
    given = call.arguments
    config = given.get("config") if given.get("config") is not None else given.get("config_params")
    where = "config given to deepspeed.initialize"
    if config is None:
        script_args = given.get("args")
        for name in ("deepspeed_config", "deepscale_config"):
            config = config if config is not None else getattr(script_args, name, None)
    if config is None or isinstance(config, dict):
        return config, where
    from deepspeed import load_ds_config

    where = str(config) if os.path.exists(str(config)) else where
    return load_ds_config(config), where

"""`deepspeed.initialize` with a plan, or with the tracer: decides whether we act at all, then attaches to the finished engine."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch.distributed.constants import default_pg_timeout

from ..core.errors import EspressoError
from . import plan_source
from .plan_source import DISABLE_ENV, Absent, Source

TRACE_ENV = "ESPRESSO_TRACE_OUT"
TRACE_CONFIG_ENV = "ESPRESSO_TRACE_CONFIG"
BLOCK = "espresso"


def wanted(initialize: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]) -> bool:
    """Whether this call has a plan, a block or a tracer. If not, DeepSpeed must run as if we did not exist."""
    if os.environ.get(TRACE_ENV) or plan_source.named_by_env():
        return True
    config, _ = _script_config(_bound(initialize, args, kwargs))
    return config is not None and BLOCK in config


def initialize_with_plan(initialize: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """Call `initialize`, then attach the plan (or the tracer) to its engine.

    Raises:
        EspressoError: the same one on every rank, before the first step.
    """
    call = _bound(initialize, args, kwargs)
    if os.environ.get(TRACE_ENV):
        return _traced(initialize, call)
    config, where = _script_config(call)
    source: Source | None = None
    if config is None:
        _join(call)
        source = find_plan(None, where)  # the plan is the config
        call.arguments["config"] = dict(source.ds_config)
    result = initialize(*call.args, **call.kwargs)
    if _disabled(config if source is None else source.ds_config):
        return _without_plan(result)
    if config is not None and isinstance(config.get(BLOCK), dict) and config[BLOCK].get("pipeline") is not None:
        from .pipeline import attach_pipeline

        attach_pipeline(result[0], config, where)
        return result
    fault: EspressoError | None = None
    if config is not None:
        source = find_plan(config, where)
        if not source.block.enabled:
            return _without_plan(result)
        try:
            plan_source.check_against_config(source, config, where)
        except EspressoError as error:
            fault = error
    if source is not None and source.plan.pipeline is not None:
        from .staged import attach_staged_plan

        attach_staged_plan(result[0], source, fault)
        return result
    from .engine import attach_plan

    attach_plan(result[0], source, fault)
    return result


def _traced(initialize: Callable[..., Any], call: inspect.BoundArguments) -> Any:
    config, _ = _script_config(call)
    if config is None and os.environ.get(TRACE_CONFIG_ENV):
        call.arguments["config"] = os.environ[TRACE_CONFIG_ENV]
    result = initialize(*call.args, **call.kwargs)
    if getattr(result[0], "pipeline_parallelism", False):
        from .pipeline_tracer import attach_pipeline_tracer

        attach_pipeline_tracer(result[0])
    else:
        from .tracer import attach_tracer

        attach_tracer(result[0])
    return result


def _join(call: inspect.BoundArguments) -> None:
    """Join the process group as `deepspeed.initialize` is about to, unless the script has done so."""
    from deepspeed import comm
    from deepspeed.accelerator import get_accelerator

    given = {name: call.arguments[name] for name in ("distributed_port", "dist_init_required") if name in call.arguments}
    comm.init_distributed(dist_backend=get_accelerator().communication_backend_name(), **given)


def find_plan(config: dict[str, Any] | None, where: str) -> Source:
    """The run's plan: the environment's, else that of the script's config. Collective over all ranks that were told of a plan.

    Raises:
        EspressoError: the same one on every rank.
    """
    from .engine import MEETING_S
    from .plan_sharing import share

    own: Source | Absent = Absent("no plan")
    fault: EspressoError | None = None
    try:
        own = plan_source.from_env() or plan_source.from_config(config, where) or own
    except EspressoError as error:
        fault = error
    if config is None:  # ranks may come late: no collective call of DeepSpeed was before this one
        return share(own, fault, default_pg_timeout.total_seconds())
    return share(own, fault, own.block.timeout_s if isinstance(own, Source) else MEETING_S)


def _without_plan(result: Any) -> Any:
    print("espresso: disabled by the user: DeepSpeed runs as if there were no plan", file=sys.stderr, flush=True)
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

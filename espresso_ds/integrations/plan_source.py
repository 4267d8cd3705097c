"""Where a run's plan comes from: the launcher's environment, or the "espresso" block of the config of `deepspeed.initialize`.

The launcher puts the whole file into `ESPRESSO_PLAN` (gzip, URL-safe base64: no launcher quotes or splits such text), so the plan
needs no shared file system; `ESPRESSO_CONFIG` names the file and serves where the text would not fit into one variable, and for
`mpirun` or torchrun without the launcher.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.config import EspressoBlock
from ..core.errors import FileError, MismatchError
from ..core.plan import Plan, load_plan_file, plan_of, read_block

PLAN_ENV = "ESPRESSO_PLAN"
PATH_ENV = "ESPRESSO_CONFIG"
DISABLE_ENV = "ESPRESSO_DISABLE"
_MOST_BYTES = 100_000  # Linux caps one variable at 128 KiB


@dataclass(frozen=True)
class Source:
    """A plan with the config that it was written into; `where` names its origin in messages."""

    ds_config: dict[str, Any]
    block: EspressoBlock
    plan: Plan
    where: str


def export_plan(path: str) -> None:
    """Check a plan file and put it into the environment that workers will inherit. Raises FileError."""
    config, _, _ = load_plan_file(path)
    text = base64.urlsafe_b64encode(gzip.compress(json.dumps(config).encode(), mtime=0)).decode().rstrip("=")
    os.environ[PATH_ENV] = str(Path(path).resolve())
    os.environ.pop(PLAN_ENV, None)
    if len(text) <= _MOST_BYTES:
        os.environ[PLAN_ENV] = text


def from_env() -> Source | None:
    """The plan that the launcher sent, or None. Raises FileError where it is torn or the file is missing on this host."""
    path = os.environ.get(PATH_ENV)
    if text := os.environ.get(PLAN_ENV):
        where = path or PLAN_ENV
        try:
            config = json.loads(gzip.decompress(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))))
        except (ValueError, OSError, EOFError) as error:
            raise FileError(f"{PLAN_ENV}: the plan was damaged on its way to this worker ({error}); launch again") from None
        block = read_block(config, where)
        if block is None:
            raise FileError(f'{PLAN_ENV}: holds no "espresso" block; launch with `deepspeed --espresso_config plan.json`')
        return Source(config, block, plan_of(block, where), where)
    if path:
        config, block, plan = load_plan_file(path)
        return Source(config, block, plan, path)
    return None


def from_config(ds_config: dict[str, Any] | None, where: str) -> Source | None:
    """The plan in a config that the script gave, or None where it has no block or the block is disabled. Raises FileError."""
    block = read_block(ds_config, where) if ds_config is not None else None
    if ds_config is None or block is None or not block.enabled:
        return None
    return Source(ds_config, block, plan_of(block, where), where)


def choose(env: Source | None, ds_config: dict[str, Any] | None, where: str) -> Source | None:
    """The run's one plan. A block without a plan is completed by the environment's; two different plans are an error."""
    if env is None:
        return from_config(ds_config, where)
    if ds_config is not None and (block := read_block(ds_config, where)) is not None and block.plan is not None:
        other = plan_of(block, where)
        if other.seal != env.plan.seal:
            raise MismatchError(
                f"two plans: {env.where} (seal {env.plan.seal}) from the launcher and {where} (seal {other.seal}) in the "
                "script's config; keep one of them"
            )
    return env

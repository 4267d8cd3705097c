"""Where a rank's plan comes from: the launcher's environment, a file of its host, or the config of `deepspeed.initialize`.

The launcher packs the whole file (gzip, URL-safe base64: no launcher quotes or splits such text) into `ESPRESSO_PLAN_0`,
`ESPRESSO_PLAN_1`, ... as far as that launcher's command line has room, so that the plan needs no shared file system.
`ESPRESSO_CONFIG` names the file, for plans that are larger and for `mpirun` or torchrun without the launcher.
`ESPRESSO_PLAN_HASH`, the hash of the content, travels always: a file of another hash does not count. A rank that has none gets it
from the others (plan_sharing.py).
"""

from __future__ import annotations

import base64
import gzip
import json
import os
import zlib
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from ..core.config import EspressoBlock
from ..core.errors import FileError, MismatchError
from ..core.plan import Plan, load_plan_file, plan_of, read_block
from ..core.record import fingerprint

PART_ENV = "ESPRESSO_PLAN_{}"
HASH_ENV = "ESPRESSO_PLAN_HASH"
PATH_ENV = "ESPRESSO_CONFIG"
DISABLE_ENV = "ESPRESSO_DISABLE"
PIPELINE_BESIDE_PLAN = (
    '"pipeline" in the "espresso" block next to a plan, which says itself what crosses between stages: leave "pipeline" out, or '
    "plan again with it"
)
_PART_BYTES = 100_000  # Linux caps one variable, and one word of a command line, at 128 KiB
_MOST_PARTS = 6  # each stands in the launcher's environment and again in its command line, which share 2 MiB
_ONE_WORD = ("pdsh", "mvapich")  # all variables travel inside one word: the command for the remote shell


@dataclass(frozen=True)
class Source:
    """A plan with the config that it was written into.

    Attributes:
        ds_config: the DeepSpeed config.
        block: its "espresso" block.
        plan: the plan in that block.
        where: names its origin in messages.
        hash: of the whole plan file; empty for a config that the script gave.
    """

    ds_config: dict[str, Any]
    block: EspressoBlock
    plan: Plan
    where: str
    hash: str = ""


@dataclass(frozen=True)
class Absent:
    """This rank was told of a plan and does not have it; `why` says what it found instead."""

    why: str


def export_plan(path: str, launcher: str) -> None:
    """Check a plan file and put it into the environment that workers will inherit.

    Args:
        path: plan.json.
        launcher: the name of DeepSpeed's launcher, which decides how much can travel.

    Raises:
        FileError: the file is not a sound plan.
    """
    config, _, _ = load_plan_file(path)
    text = base64.urlsafe_b64encode(gzip.compress(json.dumps(config).encode(), mtime=0)).decode().rstrip("=")
    for name in _part_names():
        del os.environ[name]  # of a launch around this one
    os.environ[PATH_ENV] = str(Path(path).resolve())
    os.environ[HASH_ENV] = fingerprint(config)
    parts = [text[start : start + _PART_BYTES] for start in range(0, len(text), _PART_BYTES)]
    if len(parts) <= (1 if launcher in _ONE_WORD else _MOST_PARTS):
        os.environ.update({PART_ENV.format(number): part for number, part in enumerate(parts)})


def named_by_env() -> bool:
    """Whether a launcher or the user told this rank of a plan."""
    return bool(os.environ.get(PATH_ENV) or os.environ.get(HASH_ENV))


def from_env() -> Source | Absent | None:
    """The plan that this rank was told of: itself, or why it is not here; None where it was told of none.

    Raises:
        FileError: the plan is torn, edited or of a newer schema.
    """
    if not named_by_env():
        return None
    path, expected = os.environ.get(PATH_ENV), os.environ.get(HASH_ENV)
    if text := "".join(os.environ[name] for name in _part_names()):
        try:
            config = json.loads(gzip.decompress(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))))
        except (ValueError, OSError, EOFError, zlib.error) as error:
            raise FileError(
                f"{PART_ENV.format(0)}: the plan was damaged on its way to this rank ({error}); launch again"
            ) from None
        return sent(config, path or PART_ENV.format(0))
    if not path:
        return Absent(f"{PATH_ENV} is not set")
    try:
        Path(path).stat()
    except FileNotFoundError:
        return Absent("no such file")
    except OSError as error:
        return Absent(str(error))
    config, block, plan = load_plan_file(path)
    found = fingerprint(config)
    if expected and expected != found:
        return Absent(f"another plan, hash {found}")
    return Source(config, block, plan, path, found)


def sent(ds_config: dict[str, Any], where: str) -> Source:
    """The plan that the launcher or another rank sent. Raises FileError where it is not the one that was launched."""
    found, expected = fingerprint(ds_config), os.environ.get(HASH_ENV)
    if expected and expected != found:
        raise FileError(
            f"{where}: a plan of hash {found} reached this rank, not that of hash {expected}; launch again, and look for "
            "ESPRESSO_ variables in the login files of this host"
        )
    block = read_block(ds_config, where)
    if block is None:
        raise FileError(f'{where}: holds no "espresso" block; launch with `deepspeed --espresso_config plan.json`')
    return Source(ds_config, block, plan_of(block, where), where, found)


def from_config(ds_config: dict[str, Any] | None, where: str) -> Source | None:
    """The plan in a config that the script gave, or None where it has no block or the block is disabled. Raises FileError."""
    block = read_block(ds_config, where) if ds_config is not None else None
    if ds_config is None or block is None or not block.enabled:
        return None
    return Source(ds_config, block, plan_of(block, where), where)


def check_against_config(source: Source, ds_config: dict[str, Any] | None, where: str) -> None:
    """Raise MismatchError where the script's config holds another plan; one without a plan is completed by `source`."""
    if ds_config is not None and (block := read_block(ds_config, where)) is not None and block.plan is not None:
        other = plan_of(block, where)
        if other.seal != source.plan.seal:
            raise MismatchError(
                f"two plans: {source.where} (seal {source.plan.seal}) from the launcher and {where} (seal {other.seal}) in the "
                "script's config; keep one of them"
            )


def _part_names() -> list[str]:
    return list(takewhile(os.environ.__contains__, map(PART_ENV.format, count())))

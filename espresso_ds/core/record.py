"""Frozen records that live in JSON files: strict to read, atomic to write, one clear line when they are wrong."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import FileError, nearest


class Record(BaseModel):
    """An immutable value with checked fields; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def read(cls, value: Any, where: str) -> Self:
        """Build the record from decoded JSON.

        Raises:
            FileError: naming `where`, the key, and the nearest known name or the fault of the value.
        """
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise FileError(f"{where}: {_first_fault(cls, error)}") from None


class FileRecord(Record):
    """A record that is a file of its own, with a schema version.

    Subclasses set `KIND` (what people call the file), `SCHEMA` (newest version known) and `MADE_BY` (the command
    that makes one), and have a field `schema_version`.
    """

    KIND: ClassVar[str]
    SCHEMA: ClassVar[int] = 1
    MADE_BY: ClassVar[str]

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read and check the file. Raises FileError with one line that names the file, the fault and the fix."""
        value = load_json(path, cls.KIND, cls.MADE_BY)
        return cls.from_json(value, str(path))

    @classmethod
    def from_json(cls, value: Any, where: str) -> Self:
        """Check decoded JSON, its schema version first, so that a newer file is not reported as unknown keys."""
        if not isinstance(value, dict):
            raise FileError(f"{where}: a {cls.KIND} is a JSON object, not {type(value).__name__}; make one with `{cls.MADE_BY}`")
        version = value.get("schema_version")
        if not isinstance(version, int) or version < 1:
            raise FileError(f"{where}: not a {cls.KIND} (schema_version is {version!r}); make one with `{cls.MADE_BY}`")
        if version > cls.SCHEMA:
            raise FileError(
                f"{where}: {cls.KIND} has schema_version {version}, this espresso_ds knows up to {cls.SCHEMA}; "
                f"upgrade espresso_ds or make the file again with `{cls.MADE_BY}`"
            )
        return cls.read(value, where)

    def save(self, path: str | Path) -> None:
        """Write the record as indented JSON, atomically."""
        write_json(path, self.model_dump(mode="json"))

    @property
    def fingerprint(self) -> str:
        """Short hash of the content, equal for equal records."""
        return fingerprint(self.model_dump(mode="json"))


def fingerprint(value: Any) -> str:
    """Return 16 hex digits of the SHA-256 of `value` in canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_json(path: str | Path, kind: str, made_by: str) -> Any:
    """Decode a strict JSON file. Raises FileError that says whether the file is missing, empty or torn."""
    path = Path(path)
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise FileError(f"{path}: no such {kind}; make one with `{made_by}`") from None
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{path}: cannot read this {kind}: {error}") from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        fault = "is empty" if not text.strip() else f"is torn or not JSON (line {error.lineno}: {error.msg})"
        raise FileError(f"{path}: this {kind} {fault}; make it again with `{made_by}`") from None


def write_json(path: str | Path, value: Any) -> None:
    """Write indented JSON so that a reader sees the old file or the whole new one, never a part.

    Raises FileError as `check_output` does.
    """
    check_output(path)
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(json.dumps(value, indent=1, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def check_output(path: str | Path) -> None:
    """Raise FileError where no file can be written: before the work whose result it is for."""
    path = Path(path)
    if path.is_dir() or not path.absolute().parent.is_dir():
        fault = "is a directory; name a file in it" if path.is_dir() else "its directory does not exist; make it first"
        raise FileError(f"{path}: {fault}")


@contextmanager
def written_elsewhere(path: Path) -> Iterator[Path]:
    """A name beside `path` for another process to write to; what is there in the end takes the place of `path`, which until then
    stays as it is.

    Raises:
        FileError: there can be no such file, or nothing was written there.
    """
    check_output(path)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield fresh
        if not fresh.exists():
            raise FileError(f"{path}: it was written on the host of rank 0, and is not here; start from that host, the first one")
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def _first_fault(cls: type[Record], error: ValidationError) -> str:
    fault = error.errors(include_url=False)[0]
    *parents, last = fault["loc"] or ("value",)
    place = ".".join(str(part) for part in fault["loc"]) or "value"
    if fault["type"] == "extra_forbidden":
        return f"unknown key {place!r}{nearest(str(last), _fields_at(cls, parents))}"
    if fault["type"] == "missing":
        return f"key {place!r} is missing"
    return f"{place} is {fault['input']!r}: {fault['msg']}"


def _fields_at(cls: type[Record], path: list[str | int]) -> list[str]:
    """Names of the fields of the record found by following `path` through nested records, lists and dicts."""
    for part in path:
        if part not in cls.model_fields:  # place in a list, key of a dict
            continue
        inner = _record_in(cls.model_fields[part].annotation)
        if inner is None:
            return []
        cls = inner
    return list(cls.model_fields)


def _record_in(annotation: Any) -> type[Record] | None:
    if isinstance(annotation, type):
        return annotation if issubclass(annotation, Record) else None
    return next((found for arg in getattr(annotation, "__args__", ()) if (found := _record_in(arg))), None)

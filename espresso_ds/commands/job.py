"""Runs a launched program (ranks of a trace or a profile) to its end: its output to a log, its progress to a reporter."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ..core.errors import EspressoError
from ..core.progress import parse_progress, print_progress

Report = Callable[[float, str], None]
"""Called with the share done, 0 to 1, and what is being done."""

_TAIL = 20


class JobError(EspressoError):
    """A launched program failed."""


def run_job(
    command: Sequence[str], log: Path, report: Report, env: Mapping[str, str] | None = None, timeout_s: float = 600.0
) -> None:
    """Run `command` in a process group of its own, which has ended however this function is left.

    Lines `@progress SHARE WHAT` of its output are reported, all others go to `log`.

    Raises:
        JobError: it failed or ran longer than `timeout_s`; with the end of its output and the log's path.
    """
    tail: deque[str] = deque(maxlen=_TAIL)
    with log.open("w") as file:
        try:
            child = subprocess.Popen(
                command,
                env={**os.environ, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        except FileNotFoundError:
            raise JobError(f"{command[0]}: no such program; is the environment's bin directory on PATH?") from None
        late = False

        def stop(*_: object) -> None:
            nonlocal late
            late = True
            _end(child)

        previous = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        try:
            assert child.stdout is not None
            for line in child.stdout:
                if found := parse_progress(line):
                    report(min(1.0, found[0]), found[1])
                else:
                    file.write(line)
                    tail.append(line)
            code = child.wait()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
            _end(child)
    if late:
        raise JobError(f"{command[0]} was stopped after {timeout_s:g} s; its output is in {log}")
    if code:
        raise JobError(f"`{' '.join(command)}` failed with exit code {code}; the end of {log}:\n{''.join(tail)}")


def _end(child: subprocess.Popen[str]) -> None:
    """End what there is of its process group, also where the leader has ended and left others behind."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + 5
        try:
            os.killpg(child.pid, sign)
            while time.monotonic() < deadline:
                child.poll()  # a leader that has ended counts until it is waited for
                os.killpg(child.pid, 0)
                time.sleep(0.02)
        except ProcessLookupError:
            return


def reporter(silent: bool) -> AbstractContextManager[Report]:
    """A Reporter, or one that says nothing: where standard output is for JSON alone."""
    return nullcontext(lambda share, what: None) if silent else Reporter()


class Reporter:
    """One progress bar on a terminal; elsewhere lines `@progress SHARE WHAT`, one for each whole percent."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._last = -1

    def __enter__(self) -> Reporter:
        if self._console.is_terminal:
            columns = (
                TextColumn("[bold]espresso[/]"),
                BarColumn(),
                TextColumn("{task.percentage:3.0f}%"),
                TextColumn("{task.description}"),
            )
            self._bar = Progress(*columns, TimeElapsedColumn(), console=self._console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task("starting", total=1.0)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, share: float, what: str) -> None:
        """Show that `share` of the work is done and that `what` is being done now."""
        if self._bar is not None:
            self._bar.update(self._task, completed=share, description=what)
        elif int(share * 100) > self._last:
            self._last = int(share * 100)
            print_progress(share, what)

    def part(self, begin: float, end: float, prefix: str) -> Report:
        """A reporter for a part of the work that goes from share `begin` to `end`."""
        return lambda share, what: self(begin + share * (end - begin), f"{prefix}: {what}")

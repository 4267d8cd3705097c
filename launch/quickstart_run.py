"""Runs one long command for the quickstart: all output to a log file, its progress to one bar on the terminal."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

COUNT = re.compile(r"([A-Za-z][\w ]*): +\d+%\|[^|]*\| *(\d+)/(\d+)")
"""A progress bar as tqdm prints it: what, how many done, of how many."""
SHARE = re.compile(r"@progress +([0-9.]+) +(.*)")
"""A line of `espresso prepare` where its output is not a terminal: share done, what."""
TAIL = 25
END_S = 20


def run_logged(
    command: list[str], log: Path, env: dict[str, str], what: str, console: Console, allowed: tuple[int, ...] = ()
) -> int:
    """Run `command` to its end and return its exit code, which is 0 or one of `allowed`.

    However this function is left, the command has ended. On any other exit code the log's last lines are printed.

    Raises:
        SystemExit: the command failed.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[now]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress, log.open("wb") as file:
        bar = progress.add_task(what, total=None, now="starting")
        child = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            _follow(child, file, progress, bar)
            code = child.wait()
        finally:
            _end(child)
        progress.update(bar, total=1, completed=1, now="done" if code == 0 else f"exit code {code}")
    if code and code not in allowed:
        console.print("\n".join(_last_lines(log)), markup=False, highlight=False)
        raise SystemExit(f"quickstart: {what} failed with exit code {code}; its whole output is in {log}")
    return code


def _follow(child: subprocess.Popen[bytes], file: IO[bytes], progress: Progress, bar: TaskID) -> None:
    """Copy the child's output to `file`, moving the bar at every sign of progress."""
    assert child.stdout is not None
    while chunk := os.read(child.stdout.fileno(), 1 << 16):
        file.write(chunk)
        file.flush()
        text = chunk.decode(errors="replace")
        if counts := COUNT.findall(text):
            now, done, total = counts[-1]
            progress.update(bar, total=int(total), completed=int(done), now=f"{now} {done}/{total}")
        elif shares := SHARE.findall(text):
            share, now = shares[-1]
            progress.update(bar, total=1.0, completed=float(share), now=now.strip())


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(END_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _last_lines(log: Path) -> list[str]:
    return log.read_text(errors="replace").replace("\r", "\n").splitlines()[-TAIL:]

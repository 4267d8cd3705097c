"""Lanes: a software pipeline of communication steps, so that compression runs under communication and both under backward.

A job is a generator that yields once for every communication step it has started. Lane k (one thread) finishes the k-th step of
each job and starts its (k+1)-th, in the order in which jobs were submitted:

    lane 0   encode a, start | encode b, start  | ...
    lane 1                   | wait a, decode a | wait b, decode b, start 2nd step | ...
    lane 2                                                       | wait b's 2nd step, decode | ...

Each lane starts collectives on process groups of its own (`groups`). The calls on one group then come in plan order on every
rank, which is all that matching needs, and a second step never waits behind a first step that isn't ready yet.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Protocol

from ..core.errors import SyncError


class Pending(Protocol):
    """A communication step under way."""

    def wait(self, timeout_s: float) -> None:
        """Block until it is complete; raise if it failed or `timeout_s` have passed."""


_CLOSE_S = 5.0

Steps = Generator[Pending, None, None]


@dataclass
class Job:
    """One unit's synchronisation in one step."""

    label: str
    steps: Steps
    pending: Pending | None = None
    done: bool = False
    error: BaseException | None = None


class Lanes:
    """The threads that carry jobs from lane to lane. `close` ends them; a job's error reaches the thread that waits for it."""

    def __init__(self, count: int, timeout_s: float, on_thread_start: Callable[[], None] = lambda: None) -> None:
        self._timeout_s = timeout_s
        self._finished = threading.Condition()
        self._on_thread_start = on_thread_start
        self._inboxes: list[queue.SimpleQueue[Job | None]] = [queue.SimpleQueue() for _ in range(count + 1)]
        self._threads = [
            threading.Thread(target=self._work, args=(lane,), name=f"espresso-lane-{lane}", daemon=True)
            for lane in range(count + 1)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, label: str, steps: Steps) -> Job:
        """Queue a job on lane 0 and return at once."""
        job = Job(label, steps)
        self._inboxes[0].put(job)
        return job

    def wait(self, jobs: list[Job]) -> None:
        """Block until all jobs are done.

        Raises:
            SyncError: a job failed (its label and cause are named), or they took longer than the deadline.
        """
        with self._finished:
            settled = self._finished.wait_for(
                lambda: any(job.error for job in jobs) or all(job.done for job in jobs), self._timeout_s
            )
        if failed := next((job for job in jobs if job.error is not None), None):
            raise SyncError(f"{failed.label}: {type(failed.error).__name__}: {failed.error}") from failed.error
        if not settled:
            late = next(job for job in jobs if not job.done)
            raise SyncError(
                f"{late.label}: not synchronised after {self._timeout_s:g} s; a rank is slow, stuck or gone "
                '(a longer deadline: "timeout_s" in the espresso block)'
            )

    def close(self) -> None:
        """Stop the threads once they have finished what was submitted; those that wait for a lost rank are left behind."""
        self._inboxes[0].put(None)
        for thread in self._threads:
            thread.join(_CLOSE_S)

    def _finish(self, job: Job, error: BaseException | None = None) -> None:
        with self._finished:
            job.done, job.error = True, error
            self._finished.notify_all()

    def _work(self, lane: int) -> None:
        self._on_thread_start()
        while (job := self._inboxes[lane].get()) is not None:
            try:
                if job.pending is not None:
                    job.pending.wait(self._timeout_s)
                job.pending = next(job.steps)
                self._inboxes[lane + 1].put(job)
            except StopIteration:
                self._finish(job)
            except BaseException as error:  # any fault of a job belongs to the thread that waits for it
                self._finish(job, error)
        if lane + 1 < len(self._inboxes):
            self._inboxes[lane + 1].put(None)

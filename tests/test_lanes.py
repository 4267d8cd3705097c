"""Lanes on their own: order, overlap, errors and deadlines, without any communication."""

import threading

import pytest

from espresso_ds.core.errors import SyncError
from espresso_ds.runtime.lanes import Lanes


class Gate:
    """A communication step that is complete when the test says so."""

    def __init__(self):
        self.opened = threading.Event()

    def wait(self, timeout_s):
        if not self.opened.wait(timeout_s):
            raise SyncError("closed")


@pytest.fixture
def lanes():
    lanes = Lanes(2, timeout_s=5.0)
    yield lanes
    lanes.close()


def job(log, name, gates):
    for number, gate in enumerate(gates):
        log.append(f"{name}{number}")
        yield gate
    log.append(f"{name}.")


def test_first_steps_start_under_each_other_and_second_steps_keep_the_order(lanes):
    """b's first step starts while a's is on the way; b's second waits until a's has started."""
    log, a, b = [], [Gate(), Gate()], [Gate(), Gate()]
    jobs = [lanes.submit("a", job(log, "a", a)), lanes.submit("b", job(log, "b", b))]
    for gate in (b[0], b[1], a[1]):
        gate.opened.set()
    while len(log) < 2:
        threading.Event().wait(0.01)
    assert log == ["a0", "b0"]
    a[0].opened.set()
    lanes.wait(jobs)
    assert log.index("a1") < log.index("b1")
    assert log.index("a.") < log.index("b.")


def test_an_error_reaches_whoever_waits_at_once_with_the_label(lanes):
    """Though an earlier job is still on its way."""

    def failing():
        yield OPEN
        raise ValueError("broken payload")

    stuck = Gate()
    jobs = [lanes.submit("stuck", job([], "s", [OPEN, stuck])), lanes.submit("weight", failing())]
    with pytest.raises(SyncError, match="weight: ValueError: broken payload"):
        lanes.wait(jobs)
    stuck.opened.set()


def test_after_an_error_other_jobs_still_run(lanes):
    def failing():
        raise ValueError("now")
        yield

    log = []
    with pytest.raises(SyncError, match="x: ValueError: now"):
        lanes.wait([lanes.submit("x", failing())])
    lanes.wait([lanes.submit("y", job(log, "y", [OPEN]))])
    assert log == ["y0", "y."]


def test_waiting_has_a_deadline():
    lanes = Lanes(1, timeout_s=0.2)
    never = Gate()
    with pytest.raises(SyncError, match=r"w: (not synchronised after 0.2 s|SyncError: closed)"):
        lanes.wait([lanes.submit("w", job([], "w", [never]))])
    never.opened.set()
    lanes.close()


OPEN = Gate()
OPEN.opened.set()

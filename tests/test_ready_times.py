"""The summary of ranks' clocks as a trace: what a step of all ranks together takes, no more."""

import pytest
import torch

from espresso_ds.profiler.model import Recorder, StepTimes, summarise

ABOUT = {"model": "m", "ranks_per_node": 2, "config": {}, "wire_dtype": "float32"}


def parameters(*names):
    return {name: torch.nn.Parameter(torch.zeros(3)) for name in names}


def test_ranks_that_share_a_core_do_not_make_the_step_longer_than_it_was():
    first = StepTimes(forward_s=1.0, backward_s=6.0, after_s=2.0, ready={"a": 5.0, "b": 1.0}, firings={"a": 1, "b": 2})
    second = StepTimes(forward_s=4.0, backward_s=4.0, after_s=1.0, ready={"a": 3.5, "b": 1.0}, firings={"a": 1, "b": 2})
    trace = summarise([[first] * 3, [second] * 3], parameters("a", "b"), **ABOUT)
    assert trace.compute_s == pytest.approx(8.0 + 2.0)  # 4 + 6 + 2 would be the sum of the longest of each
    assert (trace.forward_s, trace.backward_s, trace.after_s) == pytest.approx((4.0, 4.0, 2.0))
    assert [(tensor.name, tensor.ready_s, tensor.firings) for tensor in trace.tensors] == [
        ("b", pytest.approx(1.0), 2),
        ("a", pytest.approx(3.5), 1),
    ]


def test_a_tensor_without_gradient_is_ready_when_backward_ends_and_none_is_later():
    times = StepTimes(forward_s=1.0, backward_s=2.0, after_s=0.5, ready={"a": 2.5}, firings={"a": 1})
    trace = summarise([[times]], parameters("a", "never"), **ABOUT)
    assert {tensor.name: tensor.ready_s for tensor in trace.tensors} == pytest.approx({"a": 2.0, "never": 2.0})


def test_what_is_waited_for_after_backward_is_not_computing(monkeypatch):
    clock = iter((0.0, 0.0, 1.0, 3.0, 10.0, 10.5))
    monkeypatch.setattr(Recorder, "_now", lambda self: next(clock))
    recorder = Recorder(parameters("a"))
    recorder.restart()
    recorder.backward_begins()
    recorder.backward_ends()
    recorder.goes_on()
    recorder.step_ends()
    (times,) = recorder.steps
    assert (times.forward_s, times.backward_s, times.after_s) == (1.0, 2.0, 0.5)

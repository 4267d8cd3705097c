"""Running units through executors in the tests, without lanes: every rank's thread drives all of its units itself."""

import torch

from espresso_ds.runtime.executor import Executor


def drive(executor: Executor, units, xs, step, at_once=32):
    """One step of all units, a few of them at once: their k-th routines start in plan order, as lanes would start them."""
    for first in range(0, len(units), at_once):
        few = slice(first, first + at_once)
        runs = [executor.run(unit, x, step) for unit, x in zip(units[few], xs[few], strict=True)]
        while runs:
            started = [(run, pending) for run in runs if (pending := next(run, None)) is not None]
            for _, pending in started:
                pending.wait(30.0)
            runs = [run for run, _ in started]


def synchronised(executor: Executor, units, grads, dtype=torch.float32, at_once=32):
    """The outputs, shape (steps, units, n), for this rank's gradients of shape (steps, n), which all units get."""
    outputs = []
    for step, grad in enumerate(grads):
        xs = []
        for unit in units:
            x = torch.full((executor.buffer_numel(unit),), torch.nan, dtype=unit.dtype(dtype))  # padding may be anything
            x[: unit.numel] = grad
            xs.append(x)
        drive(executor, units, xs, step, at_once)
        outputs.append(torch.stack([x[: unit.numel].float() for unit, x in zip(units, xs, strict=True)]))
    return torch.stack(outputs)

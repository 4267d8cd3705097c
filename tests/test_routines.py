"""Routines on gloo, ranks as threads, against numpy on the gathered inputs."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from ranks import DEADLINE_S, Ranks

from espresso_ds.core import option
from espresso_ds.core.errors import SyncError
from espresso_ds.core.option import Task
from espresso_ds.runtime import routines

WORLDS = (1, 2, 3, 4)
LENGTHS = (1, 7, 1001)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)


@pytest.fixture(scope="module", params=WORLDS)
def ranks(request):
    ranks = Ranks(request.param)
    yield ranks
    ranks.close()


def inputs(world: int, length: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Whole numbers so small that every sum of four is exact in every dtype: any order gives the same bits."""
    generator = torch.Generator().manual_seed(world * length)
    return [torch.randint(0, 32, (length,), generator=generator).to(dtype) for _ in range(world)]


def as_numpy(tensors) -> np.ndarray:
    return np.stack([tensor.to(torch.float64).numpy() for tensor in tensors])


def test_every_routine_of_the_options_has_its_function():
    assert set(routines.ROUTINES) == option.ROUTINES


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("task", [Task.ALLREDUCE, Task.REDUCE, Task.BROADCAST])
def test_routines_in_place(ranks, task, length, dtype):
    given = inputs(ranks.world, length, dtype)
    root = ranks.world - 1

    def work(rank, group):
        x = given[rank].clone()
        arguments = (x, group) if task is Task.ALLREDUCE else (x, root, group)
        routines.ROUTINES[task](*arguments).wait(DEADLINE_S)
        return x

    got = ranks.run(work)
    expected = as_numpy(given)[root] if task is Task.BROADCAST else as_numpy(given).sum(0)
    for rank, x in enumerate(got):
        if task is not Task.REDUCE or rank == root:
            np.testing.assert_array_equal(x.to(torch.float64).numpy(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("task", [Task.ALLGATHER, Task.GATHER])
def test_routines_that_gather_rows(ranks, task, length, dtype):
    given = inputs(ranks.world, length, dtype)
    root = ranks.world - 1

    def work(rank, group):
        receives = task is Task.ALLGATHER or rank == root
        out = torch.empty(ranks.world * length, dtype=dtype) if receives else None
        arguments = (out, given[rank], group) if task is Task.ALLGATHER else (out, given[rank], root, group)
        routines.ROUTINES[task](*arguments).wait(DEADLINE_S)
        return out

    for out in ranks.run(work):
        if out is not None:
            np.testing.assert_array_equal(out.to(torch.float64).numpy(), as_numpy(given).reshape(-1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("task", [Task.ALLTOALL, Task.REDUCE_SCATTER])
def test_routines_that_scatter_rows(ranks, task, length, dtype):
    world = ranks.world
    given = inputs(world, world * length, dtype)
    before = [x.clone() for x in given]

    def work(rank, group):
        out = torch.empty(length if task is Task.REDUCE_SCATTER else world * length, dtype=dtype)
        routines.ROUTINES[task](out, given[rank], group).wait(DEADLINE_S)
        return out

    rows = as_numpy(before).reshape(world, world, length)  # sender, receiver, element
    for rank, out in enumerate(ranks.run(work)):
        expected = rows[:, rank].sum(0) if task is Task.REDUCE_SCATTER else rows[:, rank].reshape(-1)
        np.testing.assert_array_equal(out.to(torch.float64).numpy(), expected)
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True)), "inputs are left alone"


def test_reduce_scatter_adds_in_rank_order(ranks):
    world, length = ranks.world, 501
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(world * length, generator=generator) * 10.0**rank for rank in range(world)]

    def work(rank, group):
        out, scratch = torch.empty(length), torch.empty(world * length)
        started = routines.reduce_scatter(out, given[rank], group, scratch=scratch)
        started.wait(DEADLINE_S)
        started.wait(DEADLINE_S)  # a second wait must not add the rows again
        return out

    rows = np.stack([x.numpy() for x in given]).reshape(world, world, length)
    for rank, out in enumerate(ranks.run(work)):
        expected = rows[0, rank].copy()
        for sender in range(1, world):
            expected += rows[sender, rank]
        np.testing.assert_array_equal(out.numpy(), expected)


def test_allreduce_leaves_the_same_bits_on_all_ranks(ranks):
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(100_003, generator=generator) for _ in range(ranks.world)]

    def work(rank, group):
        x = given[rank].clone()
        routines.allreduce(x, group).wait(DEADLINE_S)
        return x

    got = ranks.run(work)
    assert all(torch.equal(x.view(torch.int32), got[0].view(torch.int32)) for x in got)
    np.testing.assert_allclose(got[0].numpy(), as_numpy(given).sum(0), rtol=1e-4, atol=1e-5)


def test_many_in_flight_on_several_lanes():
    """As the executor uses them: a thread and a group per lane, many routines started before the first is waited for."""
    world, lanes, units = 3, 3, 20
    ranks = Ranks(world, lanes)

    def lane_of_rank(rank, lane):
        group = ranks.groups[lane][rank]
        outs, started = [], []
        for unit in range(units):
            out = torch.empty(world * (unit + 1), dtype=torch.uint8)
            inp = torch.full((unit + 1,), 50 * rank + 10 * lane + unit % 10, dtype=torch.uint8)
            outs.append(out)
            started.append(
                routines.allgather(out, inp, group) if unit % 2 else routines.gather(out if rank == 0 else None, inp, 0, group)
            )
        for pending in reversed(started):
            pending.wait(DEADLINE_S)
        return outs

    with ThreadPoolExecutor(world * lanes) as threads:
        futures = {(r, k): threads.submit(lane_of_rank, r, k) for r in range(world) for k in range(lanes)}
        got = {key: future.result(2 * DEADLINE_S) for key, future in futures.items()}
    ranks.close()
    for (rank, lane), outs in got.items():
        for unit, out in enumerate(outs):
            if unit % 2 or rank == 0:
                expected = np.repeat([50 * r + 10 * lane + unit % 10 for r in range(world)], unit + 1)
                np.testing.assert_array_equal(out.numpy(), expected)


def test_a_deadline_that_passes_is_an_error_and_the_routine_goes_on():
    ranks = Ranks(2)
    gave_up = threading.Event()

    def work(rank, group):
        if rank == 1:
            assert gave_up.wait(DEADLINE_S)
        x = torch.ones(4)
        started = routines.allreduce(x, group)
        if rank == 0:
            with pytest.raises(SyncError, match=r"allreduce: .*timed out"):
                started.wait(0.05)
            gave_up.set()
        started.wait(DEADLINE_S)
        return x.tolist()

    assert ranks.run(work) == [[2.0] * 4] * 2
    ranks.close()


@pytest.mark.parametrize("task", [Task.ALLREDUCE, Task.ALLGATHER, Task.ALLTOALL, Task.GATHER])
def test_a_rank_that_is_gone_is_an_error(task):
    ranks = Ranks(2)
    ranks.run(lambda rank, group: routines.allreduce(torch.ones(1), group).wait(DEADLINE_S))
    here, gone = ranks.groups[0]
    ranks.groups[0] = [here]
    gone.shutdown()
    del gone
    out, x = torch.empty(2_000_002), torch.ones(1_000_001)
    arguments = {
        Task.ALLREDUCE: (x,),
        Task.ALLGATHER: (out, x),
        Task.ALLTOALL: (torch.empty(8), torch.ones(8)),
        Task.GATHER: (out, x, 0),
    }
    with pytest.raises(SyncError, match=task.name.lower()):
        routines.ROUTINES[task](*arguments[task], here).wait(DEADLINE_S / 3)
    ranks.close()


def test_buffers_that_do_not_fit_are_refused(ranks):
    world, group = ranks.world, ranks.groups[0][0]  # refused before anything is sent: one rank is enough
    x = torch.ones(2 * world)
    with pytest.raises(SyncError, match=f"not {world} times"):
        routines.allgather(torch.empty(3 * world + 1), x, group)
    with pytest.raises(SyncError, match=r"torch.float32 are not .* torch.uint8"):
        routines.alltoall(torch.empty(2 * world, dtype=torch.uint8), x, group)
    with pytest.raises(SyncError, match="flat and contiguous"):
        routines.allreduce(torch.ones(8)[::2], group)
    with pytest.raises(SyncError, match="flat and contiguous"):
        routines.broadcast(torch.ones(2, 2), 0, group)
    with pytest.raises(SyncError, match="has no output buffer"):
        routines.gather(None, x, 0, group)
    if world > 1:
        with pytest.raises(SyncError, match="equal rows"):
            routines.alltoall(torch.empty(2 * world + 1), torch.empty(2 * world + 1), group)

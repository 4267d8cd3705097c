"""Chunks: planner and runtime cut alike, and what is sent is the same tensor."""

import dataclasses
import random

import pytest
import torch
from planner_cases import chunked, cluster_of, codecs_of, menu_of, random_case, random_nested_case, small_menu, trace_of
from ranks import DEADLINE_S, Cluster

from espresso_ds.compressors import registry
from espresso_ds.core.chunks import chunk_lengths
from espresso_ds.core.config import CompressorSettings
from espresso_ds.core.option import Option
from espresso_ds.feedback import Feedback
from espresso_ds.planner.chunk import cut_into_chunks
from espresso_ds.planner.limits import Limits
from espresso_ds.planner.search import best_plan
from espresso_ds.planner.timeline import Unit, iteration_time
from espresso_ds.planner.trials import Trials
from espresso_ds.runtime.executor import Compressor, Executor
from espresso_ds.runtime.executor import Unit as RuntimeUnit
from espresso_ds.runtime.lanes import Lanes
from espresso_ds.runtime.synchroniser import Member, Scaling, Synchroniser

GATHERED = Option.parse("C.cpu AG.flat D.cpu")
DIVIDED = Option.parse("C.cpu A2A.flat D.cpu C.cpu AG.flat D.cpu")


@pytest.mark.parametrize("numel", [1, 5, 999, 1000, 1001, 4096, 123457])
@pytest.mark.parametrize("chunk", [None, 1, 10, 1000])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_chunks_cover_the_tensor_in_whole_shards(numel, chunk, world):
    lengths = chunk_lengths(numel, chunk, world)
    assert sum(lengths) == numel
    assert min(lengths) > 0
    assert all(length % world == 0 for length in lengths[:-1])
    if chunk is None or numel <= chunk:
        assert lengths == [numel]
    else:
        assert max(lengths) < chunk + world


def test_the_planner_cuts_large_compressed_units_where_it_pays():
    """One large tensor at the end of backward: compression, transfer and decompression follow each other unless it is cut."""
    trace = trace_of([(1 << 24, 1.0)], world=2)
    cluster, codecs = cluster_of(world=2, alpha_s=1e-4, bytes_per_s=2.4e7), codecs_of(encode=5e-9, decode=2e-9, share=0.05)
    menu = small_menu(trace, cluster, codecs, ["AR.flat", GATHERED])
    costs = menu.costs
    units = [Unit.of(trace, 0, 1, GATHERED)]
    (cut,) = cut_into_chunks(units, trace, menu, Limits(trace, menu))
    assert cut.chunk_numel is not None
    assert [piece.numel for piece in cut.pieces(2)] == chunk_lengths(1 << 24, cut.chunk_numel, 2)
    assert chunked(units, cut.chunk_numel, 2) == cut.pieces(2)
    serial = costs.walk(GATHERED, 1 << 24).lean
    whole = iteration_time(units, trace, costs)
    assert whole == pytest.approx(trace.compute_s + sum(seconds for _, seconds in serial))
    assert iteration_time([cut], trace, costs) < whole - 0.5 * serial[0][1]
    assert iteration_time([cut], trace, costs) == iteration_time(cut.pieces(2), trace, costs)
    uncompressed = [dataclasses.replace(units[0], option=Option.parse("AR.flat"))]
    assert cut_into_chunks(uncompressed, trace, menu, Limits(trace, menu)) == uncompressed
    assert [piece.numel for piece in chunked(uncompressed, 1 << 20, 2)] == [1 << 24]


@pytest.mark.parametrize("make_case", [random_case, random_nested_case])
def test_chunks_never_hurt(make_case):
    """The step with the chunks that were chosen, played from scratch, against the same units whole."""
    rng, some = random.Random(1), 0
    for _ in range(15):
        case = make_case(rng, tensors=4)
        trace, menu = case[0], menu_of(*case)
        tensors = tuple(t.model_copy(update={"numel": 8 * t.numel}) for t in trace.tensors)
        trace = trace.model_copy(update={"tensors": tensors})
        units = best_plan(trace, menu)
        cut = cut_into_chunks(units, trace, menu, Limits(trace, menu))
        assert [(u.start, u.stop, u.numel) for u in cut] == [(u.start, u.stop, u.numel) for u in units]
        assert iteration_time(cut, trace, menu.costs) <= iteration_time(units, trace, menu.costs) * (1 + 1e-9)
        assert Trials(cut, trace, menu).time == pytest.approx(iteration_time(cut, trace, menu.costs), rel=1e-12)
        some += any(unit.chunk_numel for unit in cut)
    assert some > 2


@pytest.mark.parametrize("option", [GATHERED, DIVIDED], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_unit_in_chunks_ends_as_the_mean_of_all_ranks(option, dtype):
    """Two fused parameters, 1,003 elements in four chunks, over three ranks, with a codec that loses nothing."""
    ranks = Cluster(1, 3, [option])

    def work(groups):
        generator = torch.Generator().manual_seed(groups.place.rank)
        params = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((20, 50), (3,))]
        for param in params:
            param.grad = torch.randint(-8, 9, param.shape, generator=generator).to(dtype)
        given = [param.grad.clone() for param in params]
        chunks = [RuntimeUnit(i, f"u[{i}]", n, option) for i, n in enumerate(chunk_lengths(1003, 300, 3))]
        identity = Compressor(registry.make(CompressorSettings(name="identity")), Feedback("ef"), seed=1)
        executor = Executor(chunks, [identity], groups, dtype)
        lanes = Lanes(chunks[0].steps, DEADLINE_S)
        members = [Member(str(place), param) for place, param in enumerate(params)]
        synchroniser = Synchroniser([(chunks, members)], executor, lanes, Scaling(1.0, 1 / 3), dtype)
        synchroniser.ready("1")
        synchroniser.ready("0")
        synchroniser.flush()
        lanes.close()
        return given, [param.grad for param in params]

    try:
        told = ranks.run(work)
    finally:
        ranks.close()
    for place in range(2):
        expected = (sum(given[place].float() for given, _ in told) / 3).to(dtype)
        for _, got in told:
            torch.testing.assert_close(got[place], expected)

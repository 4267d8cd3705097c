"""Chunks: planner and runtime cut alike, and what is sent is the same tensor."""

import dataclasses

import pytest
import torch
from planner_cases import cluster_of, codecs_of, small_menu, trace_of
from ranks import DEADLINE_S, Ranks

from espresso_ds.compressors import registry
from espresso_ds.core.chunks import chunk_lengths
from espresso_ds.core.config import CompressorSettings
from espresso_ds.core.option import Option
from espresso_ds.feedback import Feedback
from espresso_ds.planner.chunk import best_chunk, chunked
from espresso_ds.planner.timeline import Unit, iteration_time
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
    size = best_chunk(units, trace, menu)
    assert size is not None
    whole, cut = (iteration_time(chunked(units, chunk, 2), trace, costs) for chunk in (None, size))
    serial = costs.walk(GATHERED, 1 << 24).lean
    assert whole == pytest.approx(trace.compute_s + sum(seconds for _, seconds in serial))
    assert cut < whole - 0.5 * serial[0][1]
    uncompressed = [dataclasses.replace(units[0], option=Option.parse("AR.flat"))]
    assert chunked(uncompressed, size, 2) == uncompressed
    assert best_chunk(uncompressed, trace, menu) is None


@pytest.mark.parametrize("option", [GATHERED, DIVIDED], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_unit_in_chunks_ends_as_the_mean_of_all_ranks(option, dtype):
    """Two fused parameters, 1,003 elements in four chunks, over three ranks, with a codec that loses nothing."""
    ranks = Ranks(3, lanes=2)

    def work(rank, groups):
        generator = torch.Generator().manual_seed(rank)
        params = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((20, 50), (3,))]
        for param in params:
            param.grad = torch.randint(-8, 9, param.shape, generator=generator).to(dtype)
        given = [param.grad.clone() for param in params]
        chunks = [RuntimeUnit(i, f"u[{i}]", n, option) for i, n in enumerate(chunk_lengths(1003, 300, 3))]
        identity = Compressor(registry.make(CompressorSettings(name="identity")), Feedback("ef"), seed=1)
        executor = Executor([identity], groups, dtype)
        lanes = Lanes(chunks[0].steps, DEADLINE_S)
        members = [Member(str(place), param) for place, param in enumerate(params)]
        synchroniser = Synchroniser([(chunks, members)], executor, lanes, Scaling(1.0, 1 / 3), dtype)
        synchroniser.ready("1")
        synchroniser.ready("0")
        synchroniser.flush()
        lanes.close()
        return given, [param.grad for param in params]

    try:
        told = ranks.run_lanes(work)
    finally:
        ranks.close()
    for place in range(2):
        expected = (sum(given[place].float() for given, _ in told) / 3).to(dtype)
        for _, got in told:
            torch.testing.assert_close(got[place], expected)

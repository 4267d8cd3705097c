"""What the planner says a plan takes of memory, against what the runtime then holds."""

import pytest
import torch
from planner_cases import cluster_of, codecs_of, trace_of

from espresso_ds.compressors import registry
from espresso_ds.compressors.base import padded
from espresso_ds.core.config import CompressorSettings
from espresso_ds.core.option import Device, Option
from espresso_ds.feedback import Feedback
from espresso_ds.planner.cost import Costs, Shape
from espresso_ds.planner.memory import buffer_bytes, feedback_per_element, memory_of
from espresso_ds.planner.timeline import Unit
from espresso_ds.planner.tree import option_tree
from espresso_ds.runtime.executor import Compressor, Executor
from espresso_ds.runtime.executor import Unit as RunUnit
from espresso_ds.runtime.groups import Groups
from espresso_ds.runtime.paths import Decode, Encode, Place, path

OPTIONS = option_tree((Device.GPU,), summable=True)
NUMEL = 4 * 3**2 * 2**12
"""Divisible by any group of 2 x 2, 1 x 3, 3 x 2 ranks, so that no shard is shorter than others."""
SHAPES = (Shape(2, 2), Shape(1, 3), Shape(3, 2))


def costs_for(shape, settings, wire):
    """Costs whose payload sizes are exactly the codec's at every size that may come."""
    codec = registry.make(settings)
    parts = sorted({NUMEL // divisor for divisor in range(1, 37) if NUMEL % divisor == 0})
    profile = codecs_of(share=0.1, summable=codec.sum_dtype is not None)
    times = profile.codecs[0].devices[0]
    times = times.model_copy(
        update={
            "device": Device.GPU,
            "numel": tuple(parts),
            "payload_nbytes": tuple(map(codec.payload_nbytes, parts)),
            "encode_s": (1e-3,) * len(parts),
            "decode_s": (1e-3,) * len(parts),
        }
    )
    only = profile.codecs[0].model_copy(update={"compressor": registry.resolve(settings), "devices": (times,)})
    return Costs(cluster_of(world=shape.world, node=shape.ranks_per_node), profile.model_copy(update={"codecs": (only,)}), wire)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
def test_buffers_are_those_that_the_busiest_rank_takes(shape, wire):
    settings = CompressorSettings(name="efsignsgd")
    costs, compressor = costs_for(shape, settings, wire), Compressor(registry.make(settings), Feedback("ef"), 0)
    checked = 0
    for option in OPTIONS:
        if option.sums_payloads:
            continue
        taken = []
        for rank in range(shape.world):
            groups = Groups(Place(*shape, rank), {})
            unit = RunUnit(0, "t", NUMEL, option)
            taken.append(Executor([unit], [compressor], groups, getattr(torch, wire)).buffer_nbytes)
        said = buffer_bytes(option, NUMEL, costs)
        indices = 16 * 8 * shape.world  # rows' order for some alltoalls
        assert max(taken) <= said + indices, option
        assert said <= max(taken) * 1.35 + 4096, option
        checked += 1
    assert checked > 100


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", ["ef", "ef21", "dgc", "none"])
def test_feedback_is_what_the_busiest_rank_keeps(shape, mode):
    settings = CompressorSettings(name="topk", density=0.1, feedback=mode)
    codec = registry.make(settings)
    for option in OPTIONS:
        if not option.compresses or option.sums_payloads:
            continue
        kept = []
        for rank in range(shape.world):
            memory = Feedback(mode)
            for step in path(option, NUMEL, 0, Place(*shape, rank)).steps:
                if isinstance(step, Encode):
                    for number, target in enumerate(step.targets):
                        payload = torch.empty(padded(codec.payload_nbytes(target.numel)), dtype=torch.uint8)
                        payload = payload[: codec.payload_nbytes(target.numel)]
                        site = f"{step.compression}/{number}"
                        memory.encode(codec, torch.zeros(target.numel), payload, 0, site, recompressed=step.compression > 0)
                elif isinstance(step, Decode):
                    for number, (target, _, _) in enumerate(step.sums):
                        memory.decoded(torch.zeros(target.numel), f"{step.compression}/decoded {number}")
            kept.append(sum(tensor.nbytes for site in memory.state_dict()["sites"].values() for tensor in site.values()))
        assert max(kept) == pytest.approx(NUMEL * feedback_per_element(option, settings, shape)), option


def test_a_unit_of_its_own_needs_no_flat_buffer_and_a_fused_one_does():
    trace = trace_of([(1024, 0.1), (2048, 0.2)], world=2)
    costs = Costs(cluster_of(), codecs_of(share=0.1))
    allreduce = Option.parse("AR.flat")
    apart = [Unit.of(trace, 0, 1, allreduce), Unit.of(trace, 1, 2, allreduce)]
    assert memory_of(apart, costs) == (0, 0)
    assert memory_of([Unit.of(trace, 0, 2, allreduce)], costs) == (0, 4 * 3072)

"""Gradients that lie apart: codecs read them where they are, with the same bytes; units let them go once they are read."""

import weakref
from itertools import accumulate, pairwise

import pytest
import torch
from codec_cases import CASES, new_payload, normal
from ranks import Cluster

from espresso_ds.compressors import native, registry
from espresso_ds.compressors.parts import Parts
from espresso_ds.core.config import CompressorSettings
from espresso_ds.core.option import Option
from espresso_ds.feedback import Feedback
from espresso_ds.runtime.executor import Compressor, Executor, Unit
from espresso_ds.runtime.lanes import Lanes
from espresso_ds.runtime.synchroniser import Member, Scaling, Synchroniser

DEADLINE_S = 20.0
LENGTHS = ((1,), (4096, 4096), (5, 0, 4091, 1, 4096), (0, 3, 70, 9000, 0, 64, 1), (20_000, 13, 13, 13))
"""Of parts: one element, blocks of codecs as they are, blocks that cross parts, empty parts."""


def apart(lengths, seed=0):
    """Tensors of these lengths and all their elements in one."""
    whole = normal(sum(lengths), seed)
    ends = [0, *accumulate(lengths)]
    return [whole[start:end].clone() for start, end in pairwise(ends)], whole


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_parts_give_the_bytes_of_the_whole(case, lengths):
    """Encoded with and without a residual, from the start and from the middle, by one thread and by three."""
    codec = CASES[case]
    tensors, whole = apart(lengths)
    for span in (slice(0, sum(lengths)), slice(sum(lengths) // 3, sum(lengths) - sum(lengths) // 4)):
        for factor in (1.0, 0.3):
            for dtype in (None, torch.float32, torch.bfloat16):
                x = whole[span] * factor
                residual = None if dtype is None else normal(x.numel(), 1).to(dtype)
                kept = None if dtype is None else torch.empty_like(residual)
                expected = new_payload(codec, x.numel())
                codec.encode(x, expected, 3, residual, kept)
                for threads in (1, 3):
                    native.use_threads(threads, 0)
                    found = new_payload(codec, x.numel())
                    left = None if residual is None else residual.clone()
                    codec.encode_parts(Parts(tensors, factor)[span], found, 3, left, left)
                    native.use_threads(1)
                    assert torch.equal(found, expected)
                    assert kept is None or torch.equal(left, kept)


@pytest.mark.parametrize("case", CASES)
def test_not_finite_parts_show(case):
    """As a whole with NaN does: the decoded values are not all finite."""
    codec = CASES[case]
    tensors, _ = apart((100, 5000))
    tensors[1][4500] = torch.nan
    payload, out = new_payload(codec, 5100), torch.zeros(5100)
    codec.encode_parts(Parts(tensors), payload, 3)
    codec.decode_add(payload, out, 3)
    assert not out.isfinite().all()


def test_what_can_be_parts():
    assert Parts.fit([torch.zeros(3), torch.zeros(2, 2)])
    assert not Parts.fit([torch.zeros(3), torch.zeros(3, dtype=torch.bfloat16)])
    assert not Parts.fit([torch.zeros(4, 4).t()[:, :2]])
    assert not Parts.fit([torch.zeros(3, device="meta")])


@pytest.mark.parametrize("mode", ["none", "ef", "ef21", "dgc"])
def test_feedback_of_parts_is_that_of_the_whole(mode):
    """Over steps; modes that cannot read parts bring them together."""
    name = "dgc" if mode == "dgc" else "quantize"
    settings = CompressorSettings(name=name, **({"density": 0.1} if mode == "dgc" else {"bits": 2}), feedback=mode)
    codec, whole_memory, parts_memory = registry.make(settings), Feedback(mode), Feedback(mode)
    assert parts_memory.reads_parts(codec) is (mode in ("none", "ef"))
    for step in range(4):
        tensors, whole = apart((700, 4000, 9), step)
        expected, found = new_payload(codec, whole.numel()), new_payload(codec, whole.numel())
        whole_memory.encode(codec, whole, expected, step, "site")
        parts_memory.encode(codec, Parts(tensors), found, step, "site")
        assert torch.equal(found, expected)


@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "in chunks"])
@pytest.mark.parametrize("option", ["C.cpu AG.flat D.cpu", "C.cpu A2A.flat D.cpu C.cpu AG.flat D.cpu"])
def test_units_let_gradients_go(option, chunked):
    """Two ranks: the sum is where a plain simulation has it, in memory of the unit, and what backward made is freed."""
    option = Option.parse(option)
    ranks = Cluster(1, 2, [option])
    numels = [600, 6000, 31]

    def work(groups):
        rank = groups.place.rank
        params = [torch.nn.Parameter(torch.zeros(numel)) for numel in numels]
        lengths = [3000, 3631] if chunked else [6631]
        chunks = [Unit(number, f"chunk {number}", numel, option) for number, numel in enumerate(lengths)]
        codec = Compressor(registry.make(CompressorSettings(name="quantize", bits=8)), Feedback("ef"), seed=1)
        executor, lanes = Executor(chunks, [codec], groups, torch.float32), Lanes(chunks[0].steps, DEADLINE_S)
        members = [Member(str(place), param) for place, param in enumerate(params)]
        synchroniser = Synchroniser([(chunks, members)], executor, lanes, Scaling(1.0, 0.5), torch.float32)
        made = []
        for step in range(2):
            for place, param in enumerate(params):
                param.grad = normal(param.numel(), 10 * step + place + 100 * rank)
                made.append(weakref.ref(param.grad))
                synchroniser.ready(str(place))
            synchroniser.flush()
        freed = all(ref() is None for ref in made)
        lanes.close()
        return freed, [param.grad.clone() for param in params]

    try:
        told = ranks.run(work)
    finally:
        ranks.close()
    for place, numel in enumerate(numels):
        mean = sum(normal(numel, 10 + place + 100 * rank) for rank in range(2)) / 2
        assert torch.equal(told[0][1][place], told[1][1][place])
        assert (told[0][1][place] - mean).abs().max() < 0.1
    assert all(freed for freed, _ in told)

"""Several codecs in one plan: each unit is sent with its own, profiles name each, and the command line chooses them."""

import argparse

import numpy as np
import pytest
import torch
from plans import plan_for
from ranks import DEADLINE_S, Cluster

from espresso_ds.commands.profile import (
    add_compressor_arguments,
    alternative_settings,
    compressor_settings,
    describe_compressors,
)
from espresso_ds.compressors import registry
from espresso_ds.core.config import CompressorSettings
from espresso_ds.core.errors import FileError
from espresso_ds.core.option import Option
from espresso_ds.feedback import Feedback
from espresso_ds.profiler import compressors
from espresso_ds.profiler.compressors import profile_compressors
from espresso_ds.profiler.compressors_mpi import slowest
from espresso_ds.runtime.executor import Compressor, Executor, Unit
from espresso_ds.runtime.lanes import Lanes
from espresso_ds.runtime.synchroniser import Member, Scaling, Synchroniser

TOPK = CompressorSettings(name="topk", density=0.05)
FP16 = CompressorSettings(name="fp16", feedback="none")
NUMEL, STEPS, WORLD = 1000, 3, 3
UNITS = (("C.cpu AG.flat D.cpu", 0), ("C.cpu AG.flat D.cpu", 1), ("AR.flat", 0), ("C.cpu AR.flat D.cpu", 1))


def train(groups):
    """Three steps over four units of one parameter each: (steps, units, numel) sums, and the sites with residuals."""
    rank = groups.place.rank
    memories = {mode: Feedback(mode) for mode in ("ef", "none")}
    made = [Compressor(registry.make(s), memories[s.feedback or "ef"], s.seed) for s in (TOPK, FP16)]
    units = [Unit(i, f"u{i}", NUMEL, Option.parse(text), codec) for i, (text, codec) in enumerate(UNITS)]
    params = [torch.nn.Parameter(torch.zeros(NUMEL)) for _ in units]
    members = [Member(unit.label, param) for unit, param in zip(units, params, strict=True)]
    lanes = Lanes(max(unit.steps for unit in units), DEADLINE_S)
    plan = [([unit], [member]) for unit, member in zip(units, members, strict=True)]
    synchroniser = Synchroniser(plan, Executor(units, made, groups, torch.float32), lanes, Scaling(1.0, 1.0), torch.float32)
    sums = []
    try:
        for step in range(STEPS):
            for number, param in enumerate(params):
                param.grad = torch.from_numpy(gradient(rank, step, number))
                synchroniser.ready(f"u{number}")
            synchroniser.flush()
            sums.append([param.grad.numpy().copy() for param in params])
    finally:
        lanes.close()
    return np.array(sums), {mode: sorted(memory.state_dict()["sites"]) for mode, memory in memories.items()}


def gradient(rank, step, unit) -> np.ndarray:
    return np.random.default_rng([rank, step, unit]).standard_normal(NUMEL).astype(np.float32)


def topk_with_feedback(gradients: np.ndarray) -> np.ndarray:
    """What one rank sends: of (steps, numel) gradients with what was not sent before, the largest. Values stay in fp32."""
    sent, left = np.zeros_like(gradients), np.zeros(NUMEL, np.float32)
    for step, grad in enumerate(gradients):
        left = left + grad
        chosen = np.argsort(-np.abs(left), kind="stable")[: round(TOPK.density * NUMEL)]
        sent[step, chosen] = left[chosen]
        left[chosen] = 0
    return sent


def test_every_unit_is_sent_with_its_own_codec():
    ranks = Cluster(1, WORLD, [Option.parse(text) for text, _ in UNITS])
    try:
        results = ranks.run(train)
    finally:
        ranks.close()
    given = np.array([[[gradient(r, s, u) for u in range(len(UNITS))] for s in range(STEPS)] for r in range(WORLD)])
    expected = [
        sum(topk_with_feedback(given[rank, :, 0]) for rank in range(WORLD)),
        given[:, :, 1].astype(np.float16).astype(np.float32).sum(0),
        given[:, :, 2].sum(0),
        given[:, :, 3].astype(np.float16).astype(np.float32).sum(0),
    ]
    tolerance = (0.05, 1e-6, 1e-6, 0.01)  # TopK's values are bf16, whose residuals are small; fp16 rounds its own sums
    for sums, sites in results:
        assert np.array_equal(sums, results[0][0])
        assert sites == {"ef": ["u0/0/0"], "none": []}
        for unit, (close, atol) in enumerate(zip(expected, tolerance, strict=True)):
            np.testing.assert_allclose(sums[:, unit], close, rtol=0, atol=atol, err_msg=str(UNITS[unit]))


def test_a_codec_that_the_plan_does_not_have_is_refused():
    plan = plan_for(torch.nn.Linear(3, 2), {}, compressors=(TOPK, FP16))
    assert [tensor.codec for tensor in plan.tensors] == [0, 1]
    plan.check("good.json")
    tensors = (plan.tensors[0], plan.tensors[1].model_copy(update={"codec": 2}))
    with pytest.raises(FileError, match=r"bad\.json: tensor 'weight' has codec 2, but the plan has 2 compressors"):
        plan.model_copy(update={"tensors": tensors}).sealed().check("bad.json")


def test_tensors_of_one_unit_share_their_codec():
    plan = plan_for(torch.nn.Linear(3, 2), {}, compressors=(TOPK, FP16), fuse=2)
    tensors = (plan.tensors[0], plan.tensors[1].model_copy(update={"codec": 1}))
    with pytest.raises(FileError, match="'bias' and 'weight' share unit 0, but not codec"):
        plan.model_copy(update={"tensors": tensors}).sealed().check("bad.json")


@pytest.fixture
def profile(monkeypatch):
    """A quick profile of two codecs, and the progress that was told."""
    monkeypatch.setattr(compressors, "_PHASE_S", 0.02)
    monkeypatch.setattr(compressors, "_POOL", 1 << 18)
    heard = []
    return profile_compressors([TOPK, FP16], (256, 5000), repeats=2, progress=lambda *news: heard.append(news)), heard


def test_a_profile_of_two_codecs_has_both_in_order(profile):
    profile, heard = profile
    topk, fp16 = profile.codecs
    assert (topk.compressor, topk.summable, fp16.compressor, fp16.summable) == (registry.resolve(TOPK), False, FP16, True)
    assert topk.relative_error > 0.5 > 1e-6 > fp16.relative_error > 0
    for codec in profile.codecs:
        (times,) = codec.devices
        assert times.payload_nbytes == tuple(map(registry.make(codec.compressor).payload_nbytes, (256, 5000)))
    fractions = [fraction for fraction, _ in heard]
    assert fractions == sorted(fractions) and (fractions[0], fractions[-1]) == (0, 1)
    assert all(what.startswith("topk" if fraction <= 0.5 else "fp16") for fraction, what in heard if fraction != 0.5)
    first, second = describe_compressors(profile)
    assert first.startswith("topk density=0.05, error feedback: relative error 0.7") and second.startswith("fp16")


def test_the_slowest_rank_counts_for_each_codec_and_size(profile):
    mine, _ = profile
    changed = []
    for number, codec in enumerate(mine.codecs):
        (times,) = codec.devices
        encode = (times.encode_s[0] * (2 if number else 0.5), times.encode_s[1] * (0.5 if number else 2))
        changed.append(codec.model_copy(update={"devices": (times.model_copy(update={"encode_s": encode}),)}))
    merged = slowest([mine, mine.model_copy(update={"codecs": tuple(changed)})])
    pairs = zip(merged.codecs, mine.codecs, changed, strict=True)
    for number, (got, first, second) in enumerate(pairs):
        sizes = (second, first) if number else (first, second)
        assert got.devices[0].encode_s == tuple(source.devices[0].encode_s[place] for place, source in enumerate(sizes))
        assert got.devices[0].decode_s == first.devices[0].decode_s and got.compressor == first.compressor


def chosen(*words, compressor=FP16, alternatives=()):
    """The settings that the command line gives over those of a block: the compressor and then its alternatives."""
    parser = argparse.ArgumentParser()
    add_compressor_arguments(parser)
    args = parser.parse_args(words)
    return compressor_settings(args, compressor), *alternative_settings(args, alternatives)


def test_alternatives_come_from_the_block_and_then_from_the_command_line():
    assert chosen() == (FP16,)
    assert chosen("--alternative", "bf16", alternatives=(TOPK,)) == (FP16, TOPK, CompressorSettings(name="bf16"))
    many = chosen(
        "--compressor", "topk", "--alternative", "quantize:bits=2:feedback=none:seed=3", "--alternative", "topk:density=0.05"
    )
    assert many == (
        CompressorSettings(name="topk", feedback="none"),
        CompressorSettings(name="quantize", bits=2, feedback="none", seed=3),
        TOPK,
    )
    assert chosen("--alternative", "topk:density=0.05", alternatives=(TOPK,)) == (FP16, TOPK)


@pytest.mark.parametrize(
    "text, message",
    [
        ("topk:density", "'density' is not KEY=VALUE"),
        ("topk:density=0.1:density=0.2", "'density=0.2' is not KEY=VALUE with a key of its own"),
        ("topk:name=fp16", "'name=fp16' is not KEY=VALUE with a key of its own"),
        ("topk:densty=0.1", "--alternative topk:densty=0.1: unknown key 'densty'; did you mean 'density'?"),
        ("topk:density=2", "density is '2'"),
        ("quantize:bits=many", "bits is 'many'"),
        ("topk:feedback=yes", "feedback is 'yes'"),
    ],
)
def test_alternatives_that_cannot_be_read(text, message):
    with pytest.raises(FileError) as caught:
        chosen("--alternative", text)
    assert message in str(caught.value)

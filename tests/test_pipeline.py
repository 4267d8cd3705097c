"""Boundaries of real pipeline engines, compressed: equal to DeepSpeed's own to the bit where nothing is lossy."""

import json
import math

import pytest
from jobs import TESTS, run, torchrun

pytestmark = pytest.mark.slow

PORTS = {(2, 1): 29651, (3, 1): 29652, (4, 1): 29653, (2, 2): 29654}
"""By stages and replicas."""
EXPECTED_FAILURES = {
    "rule is a folder": "espresso_pipeline.json: is a directory; name a file in it",
    "no such boundary": "remove it",
    "unknown codec": "did you mean 'topk'?",
    "dgc": '"feedback": "dgc" is the momentum of gradients',
    "powersgd": "powersgd cannot be planned with",
    "fp16": "use bf16",
    "plan of the launcher": '"pipeline" in the "espresso" block next to a plan',
    "ranks differ": "ranks disagree",
    "another rank's memory": "which has other things to remember",
    "other memory": 'the checkpoint holds examples in "example_memory": "float32"',
    "positions of an unknown epoch": "give deepspeed.initialize the training_data",
    "shared indices of bits": '"shared_indices" takes a "forward" with a "density"',
    "aqsgd backward": '"feedback": "aqsgd" remembers activations of examples',
}


@pytest.fixture(scope="module", params=PORTS, ids=lambda shape: f"{shape[0]} stages x {shape[1]}")
def told(request, tmp_path_factory):
    """What every rank tells, by case."""
    (stages, replicas), folder = request.param, tmp_path_factory.mktemp("pipeline")
    command = [*torchrun(stages * replicas, PORTS[request.param]), TESTS / "pipeline_worker.py", str(stages), folder]
    done = run(command, timeout=400)
    assert done.returncode == 0, done.stdout[-6000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(stages * replicas)]


def test_lossless_boundaries_equal_plain_deepspeed(told):
    for rank in told:
        for case, (expected, found) in rank["equal"].items():
            assert len(expected) == 5
            assert all(map(math.isfinite, expected))
            assert found == expected, case


def test_compressed_boundaries_train_alike_on_all_ranks(told):
    first = told[0]["compressed"]
    for case, losses in first.items():
        assert all(map(math.isfinite, losses)), case
    assert all(rank["compressed"] == first for rank in told)
    for case in ("8 bits", "8 bits each example"):
        assert first[case] != first["none"]
        assert first[case] == pytest.approx(first["none"], rel=0.02)


def test_halves_of_activations_are_compressed(told):
    """Two ranks of a stage hold half of what crosses each."""
    found = [rank["partitioned"] for rank in told if "partitioned" in rank]
    assert len(found) == (4 if len(told) == 2 * told[0]["stages"] else 0)
    for each in found:
        assert each["8 bits"] != each["none"]
        assert each["8 bits"] == pytest.approx(each["none"], rel=0.02)


def test_compressed_boundaries_learn(told):
    """One batch over and over: the loss of training falls about as far as without compression."""
    gains = {case: losses[0] - losses[-2] for case, losses in told[0]["learnt"].items()}
    assert gains["none"] > 0
    for case, gain in gains.items():
        assert gain > 0.7 * gains["none"], case


def test_evaluation_compresses_as_training_unless_told_not_to(told):
    """The same training with another evaluation."""
    compressed, plain = (told[0]["compressed"][f"topk{words}"] for words in ("", ", uncompressed evaluation"))
    evaluations = (2, 4)
    for place, (one, other) in enumerate(zip(compressed, plain, strict=True)):
        assert (one != other) == (place in evaluations)


def test_boundaries_have_settings_of_their_own(told):
    first = told[0]["compressed"]
    assert first["topk on boundary 0 only"] != first["none"]
    assert (first["topk on boundary 0 only"] == first["topk"]) == (told[0]["stages"] == 2)  # there is no other boundary


def test_aqsgd_knows_examples_again(told):
    """The first step's activations go whole, so that its loss is that of no compression; plain quantization's is not."""
    for case in ("aqsgd", "aqsgd, positions"):
        assert told[0]["learnt"][case][0] == pytest.approx(told[0]["learnt"][f"none{case[5:]}"][0], rel=1e-6)
    assert told[0]["learnt"]["2 bits"][0] != pytest.approx(told[0]["learnt"]["none"][0], rel=1e-4)


def test_training_goes_on_from_a_checkpoint_with_what_boundaries_remember(told):
    for rank in told:
        found = rank["resumed"]
        assert found["after"] == found["whole"][3:]
        assert found["forgotten"] != found["after"]


def test_what_cannot_be_done_stops_alike_on_all_ranks(told):
    for case, words in EXPECTED_FAILURES.items():
        assert words in told[0]["failures"][case], case
    assert all(rank["failures"] == told[0]["failures"] for rank in told)

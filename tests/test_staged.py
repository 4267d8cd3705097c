"""Plans with stages on real pipeline engines: boundaries, and gradients of the replicas of each stage."""

import json
import math

import pytest
from jobs import TESTS, run, torchrun

from espresso_ds.core.option import Level
from espresso_ds.integrations.engine_facts import Layout
from espresso_ds.integrations.stage_facts import stage_layout, stage_place

PORT, RANKS, STEPS = 29655, 4, 3
EXPECTED_FAILURES = {
    "no PipelineModule": "is made for 2 pipeline stages, and the model is no PipelineModule",
    "plan without stages": 'a plan without "pipeline" cannot be kept under a PipelineModule of 2 stages',
    "stages": "was made for 4 pipeline stages, this run has 2",
    "micro-batches": "was made for 5 micro-batches, this run has 2",
    "replicas": "was made for 4 replicas of each stage, this run has 2",
    "tensors of another stage": "stage 0 has no decision for '0.linear.weight', which rank 0 trains",
    "another tensor": "stage 0 has no decision for '1.linear.bias', which rank 0 trains",
    "ZeRO 1": 'in fp32 yet, but in bf16 at stage 1 with "data_types"',
    "ZeRO 1, bf16": "for the boundaries alone: `espresso plan` without --replicas",
    "bf16, not in the optimizer": "0.linear.weight wants a gradient, but DeepSpeed's optimizer for bf16 has it in no group",
    "pipeline beside the plan": 'leave "pipeline" out',
    "pipeline beside the launcher's plan": 'leave "pipeline" out',
    "boundary": "remove it",
    "ranks differ": "rank 0: a plan without",
}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What every rank tells, by case."""
    folder = tmp_path_factory.mktemp("staged")
    done = run([*torchrun(RANKS, PORT), TESTS / "staged_worker.py", folder], timeout=300)
    assert done.returncode == 0, done.stdout[-6000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.slow
def test_lossless_plans_equal_plain_deepspeed_to_the_bit(told):
    for rank in told:
        for case, (stock, found) in rank["equal"].items():
            assert len(stock["losses"]) == STEPS + 1
            assert all(map(math.isfinite, stock["losses"]))
            assert (found["losses"], found["hash"], found["tied"]) == (stock["losses"], stock["hash"], stock["tied"]), case
            assert found["left"] == [], case


@pytest.mark.slow
def test_gradients_leave_in_the_last_backward_pass_of_a_step(told):
    """Except tied ones, and where autograd runs for each of several tensors that a stage sends on."""
    for rank in told:
        early = {case: found["ready"] for case, (_, found) in rank["equal"].items()}
        every = 4 * STEPS  # the untied parameters of a stage
        whole = ("1 micro-batch", "3 micro-batches", "checkpointed", "tied")
        half = ("bf16", "bf16, added at once", "bf16, checkpointed", "bf16, tied", "ZeRO 1, bf16, fp32 sums")
        assert all(early[case] == every for case in (*whole, *half))
        for case in ("two tensors", "bf16, two tensors"):
            assert early[case] == (0 if rank["equal"][case][0]["stage"] == 0 else every)
        assert early["boundaries only, tied"] == 0


@pytest.mark.slow
def test_replicas_and_copies_of_tied_weights_stay_equal(told):
    for case in told[0]["compressed"]:
        results = [rank["compressed"][case] for rank in told]
        assert len({(result["stage"], result["hash"]) for result in results}) == 2, case
        assert len({result["tied"] for result in results}) == 1, case
        assert all(result["losses"] == results[0]["losses"] for result in results), case


@pytest.mark.slow
def test_compressed_gradients_and_boundaries_learn(told):
    gains = {case: found["losses"][0] - found["losses"][-2] for case, found in told[0]["compressed"].items()}
    for case, stock in (
        ("8 bits", "none"),
        ("signs", "none"),
        ("bf16, 8 bits", "bf16, none"),
        ("tied, 8 bits", "tied, none"),
    ):
        assert gains[stock] > 0
        assert gains[case] > 0.7 * gains[stock], case
        assert told[0]["compressed"][case]["hash"] != told[0]["compressed"][stock]["hash"]
    assert told[0]["compressed"]["8 bits, by the launcher"] == told[0]["compressed"]["8 bits"]


@pytest.mark.slow
def test_what_people_are_told(told):
    said = told[0]["said"]
    assert "8 of 8 tensors compressed (8 with quantize bits=8, error feedback)" in said
    assert "guard: off, a plan with pipeline stages is not measured" in said
    assert all(rank["said"] == "" for rank in told[1:])


@pytest.mark.slow
def test_what_cannot_be_done_stops_at_start_alike_on_all_ranks(told):
    assert told[0]["failures"].keys() == EXPECTED_FAILURES.keys()
    for case, words in EXPECTED_FAILURES.items():
        assert words in told[0]["failures"][case], case
    assert all(rank["failures"] == told[0]["failures"] for rank in told)


@pytest.mark.parametrize(
    ("hosts", "layout"),
    [
        ("aa", Layout(1, 2, True)),
        ("ab", Layout(2, 1, True)),
        ("aabb", Layout(2, 2, True)),
        ("abab", Layout(2, 2, False)),
        ("aab", Layout(1, 3, False)),
    ],
)
def test_replicas_of_a_stage_are_hosts_of_their_own_where_they_can_be(hosts, layout):
    assert stage_layout(hosts) == layout


def test_groups_of_a_stage_have_the_numbers_of_the_job():
    place = stage_place(Layout(2, 2, True), (1, 3, 5, 7), 5)
    assert place.rank == 2
    assert place.groups(Level.FLAT) == [[1, 3, 5, 7]]
    assert place.groups(Level.INTRA) == [[1, 3], [5, 7]]
    assert place.groups(Level.INTER) == [[1, 5], [3, 7]]

"""PowerSGD: against the algorithms of the paper in numpy, SVD, its own promises, and every event that its memory must survive."""

import functools
import math

import numpy as np
import pytest
import torch
from ranks import DEADLINE_S, Cluster

from espresso_ds.compressors.powersgd import PowerSGD, orthonormalise
from espresso_ds.core.errors import FileError, MismatchError, UnsupportedError
from espresso_ds.core.option import Device, Level, Option
from espresso_ds.feedback.low_rank import LowRankMemory
from espresso_ds.planner.tree import option_tree
from espresso_ds.runtime.low_rank import LowRank
from espresso_ds.runtime.streams import Offload

OPTION = Option.parse("P.cpu AR.flat Q.cpu AR.flat D.cpu")
SHAPES = ((13, 21), (7,), (), (1, 9), (9, 1), (0, 5), (40, 3, 3, 3), (3,), (17, 17))
"""Matrices, a convolution, and all that has to travel uncompressed."""
SEED = 5


@pytest.fixture(scope="module", params=(1, 2, 3, 4))
def ranks(request):
    ranks = Cluster(1, request.param, [OPTION])
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def pair():
    ranks = Cluster(1, 2, [OPTION])
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def alone():
    ranks = Cluster(1, 1, [OPTION])
    yield ranks
    ranks.close()


def gradients(world, shapes, steps, seed=0):
    """Shape (steps, world, numel), float32: what all ranks have in common, and noise."""
    generator = torch.Generator().manual_seed(seed)
    numel = sum(map(math.prod, shapes))
    return torch.randn(steps, 1, numel, generator=generator) + torch.randn(steps, world, numel, generator=generator)


class Rank:
    """One unit on one rank."""

    def __init__(self, groups, layout, memory, offload=None):
        device = torch.device("cpu")
        self.low_rank = LowRank("t", OPTION, layout, device, memory, SEED, groups.by_lane, offload or Offload(device))

    def __call__(self, given):
        """The sum over ranks of one step."""
        x = given.clone()
        for pending in self.low_rank.run(x):
            pending.wait(DEADLINE_S)
        return x


def step(groups, layout, given, memory):
    """The sum over ranks of one step."""
    return Rank(groups, layout, memory)(given)


def train(groups, given, shapes, powersgd, offload=None, **memory):
    """All steps of one rank: its outputs (steps, numel), and its memory."""
    kept = LowRankMemory(**memory)
    rank = Rank(groups, powersgd.layout(shapes), kept, offload)
    return torch.stack([rank(x) for x in given[:, groups.place.rank]]), kept


def residual(memory, site="t"):
    return memory.state_dict()["sites"][site]["residual"]


def orthogonalised(p):
    """Gram-Schmidt, twice, as in any textbook."""
    p = p.copy()
    for _ in range(2):
        for column in range(p.shape[1]):
            p[:, column] -= p[:, :column] @ (p[:, :column].T @ p[:, column])
            p[:, column] /= np.linalg.norm(p[:, column])
    return p


def algorithms_1_and_2(given, q):
    """The mean of one matrix over ranks, step by step, in float64. `given`: (steps, world, n, m); q: (m, r)."""
    errors, outputs = np.zeros(given.shape[1:]), []
    for gradients in given:
        m = gradients + errors
        p = orthogonalised((m @ q).mean(0))
        q = (m.transpose(0, 2, 1) @ p).mean(0)
        outputs.append(p @ q.T)
        errors = m - outputs[-1]
    return np.stack(outputs)


@pytest.mark.parametrize("rank", (1, 2, 3))
def test_outputs_are_those_of_the_papers_algorithms(ranks, rank):
    shapes, steps = ((30, 20), (5,), (24, 2, 9)), 6
    given = gradients(len(ranks.places), shapes, steps)
    powersgd = PowerSGD(rank)
    layout = powersgd.layout(shapes)
    first = torch.empty(layout.right_numel)
    layout.draw(first, SEED)
    results = ranks.run(functools.partial(train, given=given, shapes=shapes, powersgd=powersgd))
    assert [(matrix.rows, matrix.cols, matrix.rank) for matrix in layout.matrices] == [(30, 20, rank), (24, 18, rank)]
    for matrix in layout.matrices:
        cut = slice(matrix.start, matrix.start + matrix.rows * matrix.cols)
        inputs = given[..., cut].double().numpy().reshape(steps, len(ranks.places), matrix.rows, matrix.cols)
        expected = algorithms_1_and_2(inputs, matrix.right(first).t().double().numpy())
        found = results[0][0][:, cut].reshape(steps, matrix.rows, matrix.cols) / len(ranks.places)
        np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5)  # fp32 sums, in an order that CPUs choose
    np.testing.assert_allclose(results[0][0][:, 600:605], given[..., 600:605].sum(1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", (1, 2, 4, 50))
@pytest.mark.parametrize("least_saving", (0.0, 2.0))
def test_nothing_is_lost_and_all_ranks_end_with_equal_bits(ranks, rank, least_saving):
    given = gradients(len(ranks.places), SHAPES, steps=5)
    results = ranks.run(functools.partial(train, given=given, shapes=SHAPES, powersgd=PowerSGD(rank, least_saving)))
    for outputs, memory in results:
        assert torch.equal(outputs, results[0][0])
        basis = memory.state_dict()["sites"]["t"]["basis"]
        assert torch.equal(basis, results[0][1].state_dict()["sites"]["t"]["basis"])
    balance = results[0][0].double().sum(0) + sum(residual(memory).double() for _, memory in results)
    np.testing.assert_allclose(balance, given.double().sum((0, 1)), rtol=0, atol=2e-4)


def test_full_rank_reproduces_every_matrix_in_one_step(ranks):
    given = gradients(len(ranks.places), SHAPES, steps=1)
    results = ranks.run(functools.partial(train, given=given, shapes=SHAPES, powersgd=PowerSGD(10**6, 0.0)))
    for outputs, _ in results:
        np.testing.assert_allclose(outputs[0], given[0].sum(0), rtol=0, atol=5e-5)
    # What single ranks have in other directions than the sum stays in their errors, and cancels out.
    assert sum(residual(memory) for _, memory in results).abs().max() < 5e-5


def test_warm_start_finds_the_best_approximation_of_a_matrix_that_stays(ranks):
    """Subspace iteration converges to the truncated SVD of the mean."""
    rows, cols, rank = 25, 19, 3
    u, v = (np.linalg.qr(np.random.default_rng(0).standard_normal((n, cols)))[0] for n in (rows, cols))
    values = 2.0 ** -np.arange(cols)
    mean = torch.tensor(u @ np.diag(values) @ v.T, dtype=torch.float32).reshape(-1)
    noise = torch.randn(len(ranks.places), rows * cols, generator=torch.Generator().manual_seed(1))
    given = (mean + noise - noise.mean(0)).expand(25, -1, -1)
    train_all = functools.partial(train, given=given, shapes=((rows, cols),), powersgd=PowerSGD(rank, 0.0), mode="none")
    outputs = ranks.run(train_all)[0][0].numpy().reshape(-1, rows, cols) / len(ranks.places)
    best = u[:, :rank] @ np.diag(values[:rank]) @ v[:, :rank].T
    np.testing.assert_allclose(outputs[-1], best, rtol=0, atol=1e-5)
    assert np.linalg.norm(outputs[0] - best) > 0.01, "the first step alone is not enough"


def test_errors_stay_bounded_where_ranks_differ(pair):
    """Had they the summed factors subtracted, they would take up all that ranks differ by, and grow as the root of the steps."""
    shapes = ((24, 32),)
    given = gradients(2, shapes, steps=160, seed=1)
    norms = [
        [
            residual(memory).norm()
            for _, memory in pair.run(functools.partial(train, given=cut, shapes=shapes, powersgd=PowerSGD(2)))
        ]
        for cut in (given[:40], given)
    ]
    for early, late in zip(*norms, strict=True):
        assert late < 1.3 * early


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_the_error_is_never_larger_than_what_was_to_be_sent(alone, dtype):
    given = gradients(1, SHAPES, steps=8)[:, 0]
    layout, memory = PowerSGD(2).layout(SHAPES), LowRankMemory(dtype=dtype)

    def work(groups):
        before = torch.zeros(layout.numel)
        for x in given:
            step(groups, layout, x, memory)
            after = residual(memory)
            assert after.dtype == dtype
            for matrix in layout.matrices:
                assert matrix.of(after.float()).norm() <= matrix.of(x + before).norm() * (1 + 2**-8)
            before = after.float().clone()

    alone.run(work)


@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf, 3e38))
@pytest.mark.parametrize("reversible", (False, True))
@pytest.mark.parametrize("place", (0, 5 * 21 + 3, 13 * 21 + 2))
def test_what_is_not_finite_shows_on_all_ranks_and_leaves_the_memory_as_it_was(ranks, bad, reversible, place):
    """In a matrix and in a vector, on the last rank only; 3e38 on all: the sum overflows."""
    layout = PowerSGD(2).layout(SHAPES)
    given = gradients(len(ranks.places), SHAPES, steps=4)
    huge = bad == 3e38
    if huge and (len(ranks.places) == 1 or place > 13 * 21):
        pytest.skip("needs two ranks, and tests factors")

    def work(groups):
        memory = LowRankMemory(reversible=reversible)
        for x in given[:2, groups.place.rank]:
            step(groups, layout, x, memory)
            memory.commit()
        before = {key: value.clone() for key, value in memory.state_dict()["sites"]["t"].items()}
        x = given[2, groups.place.rank].clone()
        if huge:
            x[: 13 * 21] = bad
        elif groups.place.rank == len(ranks.places) - 1:
            x[place] = bad
        assert not step(groups, layout, x, memory).isfinite().all()
        memory.commit()
        for key, value in memory.state_dict()["sites"]["t"].items():
            assert torch.equal(value, before[key]), key
        assert step(groups, layout, given[3, groups.place.rank], memory).isfinite().all()

    ranks.run(work)


def test_a_step_taken_back_leaves_no_trace(ranks):
    layout, given = PowerSGD(2).layout(SHAPES), gradients(len(ranks.places), SHAPES, steps=6)

    def work(groups):
        straight, detour = LowRankMemory(), LowRankMemory(reversible=True)
        for x, skipped in zip(given[:3, groups.place.rank], given[3:, groups.place.rank], strict=True):
            step(groups, layout, skipped, detour)
            with pytest.raises(UnsupportedError, match="commit"):
                detour.state_dict()
            detour.rollback()
            expected, found = step(groups, layout, x, straight), step(groups, layout, x, detour)
            detour.commit()
            assert torch.equal(expected, found)
        assert torch.equal(residual(straight), residual(detour))
        assert straight.nbytes < detour.nbytes == 2 * straight.nbytes
        with pytest.raises(UnsupportedError, match="reversible"):
            straight.rollback()

    ranks.run(work)


def test_gradients_of_zero_do_not_end_the_warm_start(alone):
    """All factors of zeros are zeros; what Gram-Schmidt makes of them would be NaN, or zeros for ever."""
    shapes = ((12, 12),)
    layout, memory = PowerSGD(2).layout(shapes), LowRankMemory("none")
    x = (torch.randn(12, 2, generator=torch.Generator().manual_seed(0)) @ torch.randn(2, 12)).reshape(-1)

    def work(groups):
        assert torch.equal(step(groups, layout, torch.zeros(144), memory), torch.zeros(144))
        step(groups, layout, x, memory)
        known = memory.state_dict()["sites"]["t"]["basis"].view(2, 12).double().clone()
        assert torch.equal(step(groups, layout, torch.zeros(144), memory), torch.zeros(144))
        kept = memory.state_dict()["sites"]["t"]["basis"].view(2, 12).double()
        np.testing.assert_allclose(kept.T @ kept, known.T @ known, atol=1e-6)  # the same plane
        np.testing.assert_allclose(step(groups, layout, x, memory), x, atol=1e-5)

    alone.run(work)


@pytest.mark.parametrize("columns", ("zeros", "equal", "nearly equal", "tiny", "huge"))
def test_orthonormal_whatever_the_columns(columns):
    factor = torch.randn(4, 50, generator=torch.Generator().manual_seed(2))
    if columns == "zeros":
        factor[1] = 0
    if columns == "equal":
        factor[2] = factor[1]
    if columns == "nearly equal":
        factor[1:] = factor[0] * (1 + 1e-6 * torch.randn(3, 50, generator=torch.Generator().manual_seed(3)))
    factor *= {"tiny": 1e-42, "huge": 1e36}.get(columns, 1.0)
    orthonormalise(factor)
    np.testing.assert_allclose(factor @ factor.t(), np.eye(4), atol=1e-5)


def test_a_change_of_loss_scale_scales_all_that_follows(alone):
    layout, given = PowerSGD(2).layout(SHAPES), gradients(1, SHAPES, steps=4)[:, 0]

    def work(groups):
        one, other = LowRankMemory(), LowRankMemory()
        for x in given[:2]:
            step(groups, layout, x, one), step(groups, layout, x, other)
        other.rescale(0.25)
        assert other.scale == 0.25
        for x in given[2:]:
            assert torch.equal(step(groups, layout, x, one) * 0.25, step(groups, layout, x * 0.25, other))
        with pytest.raises(ValueError, match="positive"):
            other.rescale(math.inf)

    alone.run(work)


@pytest.mark.parametrize("mode", ("ef", "none"))
def test_training_goes_on_from_a_checkpoint_as_if_nothing_had_happened(ranks, mode, tmp_path):
    layout, given = PowerSGD(2).layout(SHAPES), gradients(len(ranks.places), SHAPES, steps=5)

    def work(groups):
        memory, other = LowRankMemory(mode), LowRankMemory(mode)
        for x in given[:3, groups.place.rank]:
            step(groups, layout, x, memory)
        torch.save(memory.state_dict(), tmp_path / f"{groups.place.rank}.pt")
        other.load_state_dict(torch.load(tmp_path / f"{groups.place.rank}.pt", weights_only=True))
        for x in given[3:, groups.place.rank]:
            assert torch.equal(step(groups, layout, x, memory), step(groups, layout, x, other))

    ranks.run(work)


def test_checkpoints_that_do_not_fit_are_refused(alone):
    layout, memory = PowerSGD(2).layout(SHAPES), LowRankMemory()
    alone.run(lambda groups: step(groups, layout, gradients(1, SHAPES, 1)[0, 0], memory))
    state = memory.state_dict()
    with pytest.raises(MismatchError, match="feedback"):
        LowRankMemory("none").load_state_dict(state)
    with pytest.raises(MismatchError, match="residual"):
        LowRankMemory(dtype=torch.bfloat16).load_state_dict(state)
    for damage, message in (
        ({"basis": state["sites"]["t"]["basis"]}, "does not hold"),
        (state["sites"]["t"] | {"basis": state["sites"]["t"]["basis"] * math.nan}, "NaN"),
        (state["sites"]["t"] | {"basis": state["sites"]["t"]["basis"].double()}, "float64"),
    ):
        with pytest.raises(MismatchError, match=message):
            LowRankMemory().load_state_dict(state | {"sites": {"t": damage}})
    with pytest.raises(MismatchError, match="scale"):
        LowRankMemory().load_state_dict(state | {"scale": math.nan})
    other = LowRankMemory()
    other.load_state_dict(state)
    wrong = PowerSGD(3).layout(SHAPES)
    with pytest.raises(MismatchError, match="elements"):
        alone.run(lambda groups: step(groups, wrong, torch.zeros(wrong.numel), other))
    with pytest.raises(UnsupportedError, match="ef21"):
        LowRankMemory("ef21")


def test_a_cleared_memory_is_as_new(alone):
    layout, given = PowerSGD(2).layout(SHAPES), gradients(1, SHAPES, steps=2)[:, 0]

    def work(groups):
        memory = LowRankMemory()
        first = step(groups, layout, given[0], memory)
        step(groups, layout, given[1], memory)
        memory.clear()
        assert torch.equal(step(groups, layout, given[0], memory), first)

    alone.run(work)


def test_units_of_vectors_and_of_nothing(ranks):
    """There are no second factors, and nothing to allreduce."""
    for shapes in (((5,), (), (2,)), ((0,),), ()):
        given = gradients(len(ranks.places), shapes, steps=2)
        results = ranks.run(functools.partial(train, given=given, shapes=shapes, powersgd=PowerSGD(2)))
        for outputs, _ in results:
            np.testing.assert_allclose(outputs, given.sum(1), rtol=0, atol=1e-6)


def test_what_does_not_save_enough_travels_uncompressed():
    layout = PowerSGD(2).layout(((10, 10), (5,), (8, 8), (6, 3, 3), (100,), (1000, 2)))
    assert [(m.start, m.rows, m.cols, m.rank) for m in layout.matrices] == [(0, 10, 10, 2)]  # 100 > 2 * 2 * 20 = 80
    assert [(plain.start, plain.numel) for plain in layout.plain] == [(100, 5 + 64 + 54 + 100 + 2000)]
    assert (layout.left_numel, layout.right_numel) == (20 + 2223, 20)
    assert PowerSGD(2).layout(((10, 10), (2, 32, 8))).right_numel == 20
    assert PowerSGD(1, 0.0).layout(((5,), (3, 2))).left_numel == 5 + 3


def test_steps_allocate_no_more_than_factors(alone):
    """Nothing of the size of the gradient, and the same in every step.

    Sizes are net of what is freed meanwhile, and garbage of earlier tests may be: only the largest of each step is compared.
    """
    shapes = ((256, 512), (512,), (300, 200))
    layout, memory = PowerSGD(4).layout(shapes), LowRankMemory()
    x = gradients(1, shapes, 1)[0, 0]

    def work(groups):
        rank, taken = Rank(groups, layout, memory), []
        rank(x)
        for _ in range(3):
            with torch.autograd.profiler.profile(profile_memory=True) as profile:
                for pending in rank.low_rank.run(x):
                    pending.wait(DEADLINE_S)
            taken.append(max(event.cpu_memory_usage for event in profile.function_events))
        assert taken[0] == taken[1] == taken[2]
        assert 0 < taken[0] <= 4 * max(matrix.rank * max(matrix.rows, matrix.cols) for matrix in layout.matrices)
        assert memory.nbytes == 4 * (layout.numel + layout.right_numel)
        assert rank.low_rank.factors.nbytes == 4 * (layout.left_numel + 2 * layout.right_numel)

    alone.run(work)


def test_work_on_the_host_gives_the_same_bits(ranks):
    """With a device of its own for the tensors, whose copies are counted; here that is the CPU again."""

    class Counting(Offload):
        def __init__(self):
            super().__init__(torch.device("cpu"))
            self.needed, self.fetched, self.brought = True, 0, 0

        def fetch(self, host, source):
            self.fetched += source.numel()
            super().fetch(host, source)

        def put(self, target, host):
            self.brought += target.numel()
            super().put(target, host)

    given = gradients(len(ranks.places), SHAPES, steps=3)
    powersgd = PowerSGD(2)
    layout = powersgd.layout(SHAPES)

    def work(groups):
        offload = Counting()
        outputs = train(groups, given, SHAPES, powersgd, offload)[0]
        assert offload.fetched == offload.brought == 3 * (layout.numel + layout.left_numel + layout.right_numel)
        return outputs

    expected = ranks.run(functools.partial(train, given=given, shapes=SHAPES, powersgd=powersgd))[0][0]
    for outputs in ranks.run(work):
        assert torch.equal(outputs, expected)


def test_the_tree_has_one_more_option_for_each_device():
    both = (Device.GPU, Device.CPU)
    for devices in (both, both[:1], both[1:]):
        more = set(option_tree(devices, False, True)) - set(option_tree(devices))
        assert {str(option) for option in more} == {f"P.{d} AR.flat Q.{d} AR.flat D.{d}" for d in devices}
        for option in more:
            assert option.low_rank and option.compresses and option.compressions == 1 and option.levels == {Level.FLAT}
            assert not option.sums_payloads and Option.parse(str(option)) == option
    assert not any(option.low_rank for option in option_tree(both, True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("P.gpu AR.flat Q.cpu AR.flat D.gpu", "one device"),
        ("P.gpu AR.flat D.gpu", "possible: Q"),
        ("P.gpu AR.flat Q.gpu AR.flat", "ends compressed"),
        ("P.gpu AR.intra Q.gpu AR.flat D.gpu", "possible: AR.flat"),
        ("RS.flat P.gpu AR.flat Q.gpu AR.flat D.gpu AG.flat", "cannot come here"),
        ("P.gpu AR.flat Q.gpu AR.flat D.gpu D.gpu", "nothing more"),
        ("P.flat AR.flat Q.gpu AR.flat D.gpu", "unknown place"),
    ],
)
def test_other_orders_are_refused(text, message):
    with pytest.raises(FileError, match=message):
        Option.parse(text)

"""Every option of the tree on ranks in nodes, against the plain simulation of its maths in `option_maths`."""

import functools
import tracemalloc

import numpy as np
import option_maths
import pytest
import torch
from driving import drive, synchronised
from plain_codecs import Largest
from planner_cases import codecs_of, nested_cluster_of, trace_of
from ranks import Cluster
from torch.utils._python_dispatch import TorchDispatchMode

from espresso_ds.compressors import registry
from espresso_ds.compressors.base import Codec
from espresso_ds.compressors.identity import Identity
from espresso_ds.compressors.qsgd import QSGD
from espresso_ds.compressors.sign import EFSignSGD
from espresso_ds.compressors.topk import TopK
from espresso_ds.core.config import CompressorSettings
from espresso_ds.core.errors import UnsupportedError
from espresso_ds.core.native import library
from espresso_ds.core.option import Device, Level, Option
from espresso_ds.feedback import Feedback
from espresso_ds.planner.build import make_menu
from espresso_ds.planner.cost import Costs
from espresso_ds.planner.tree import option_tree
from espresso_ds.runtime.executor import Compressor, Executor, Unit, unfit
from espresso_ds.runtime.paths import Encode, Place, path
from espresso_ds.runtime.streams import Offload

EVERY = option_tree((Device.GPU, Device.CPU))
DISTINCT = option_tree((Device.GPU,), summable=True)
HIERARCHICAL = [option for option in DISTINCT if option.levels != {Level.FLAT}]
DENSITY = 0.2
SPARSE, SIGN = TopK(DENSITY), EFSignSGD()
MATHS = {SPARSE: option_maths.topk(DENSITY), SIGN: option_maths.sign, Identity(): option_maths.identity}


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of two ranks."""
    cluster = Cluster(2, 2, DISTINCT)
    yield cluster
    cluster.close()


class SeparateHost(Offload):
    """A host that is another device than the tensors', although both are this one. Its memory starts as garbage."""

    def __init__(self):
        self.needed, self.copies = True, 0

    def host_buffer(self, numel, dtype):
        return torch.full((numel,), 0x55, dtype=dtype)

    def fetch(self, host, source):
        self.copies += 1
        host.copy_(source)

    def put(self, target, host):
        self.copies += 1
        target.copy_(host)


def gradients(steps, world, numel, whole=False):
    """Shape (steps, world, numel), float32; whole numbers, which add up exactly in any order, if asked for."""
    generator = torch.Generator().manual_seed(numel)
    if whole:
        return torch.randint(-60, 61, (steps, world, numel), generator=generator).float()
    return torch.randn(steps, world, numel, generator=generator)


def units_of(options, numel):
    return [Unit(index, f"t{index}", numel, option) for index, option in enumerate(options)]


def executor_of(groups, units, codec, feedback, **more):
    return Executor(units, [Compressor(codec, feedback, seed=7)], groups, torch.float32, **more)


def run_all(cluster, options, numel, codec, given, mode="ef", **more):
    """Outputs of all ranks, each of shape (steps, options, n), and their feedback."""
    units = units_of(options, numel)

    def work(groups):
        feedback = Feedback(mode)
        executor = executor_of(groups, units, codec, feedback, **more)
        return synchronised(executor, units, given[:, groups.place.rank]), feedback

    return cluster.run(work)


@functools.cache
def expected(text, codec, numel, steps, nodes=2, ranks_per_node=2):
    """What the simulation gives, shape (steps, n); the option's codec actions all at one device."""
    simulation = option_maths.Cluster(nodes, ranks_per_node, text, MATHS[codec])
    given = gradients(steps, nodes * ranks_per_node, numel, whole=codec == SPARSE)
    results = np.stack([simulation.step(grads.numpy()) for grads in given])
    assert (results == results[:, :1]).all()
    return results[:, 0]


def check(options, outputs, codec, numel, steps, **shape):
    for index, option in enumerate(options):
        text = str(option).replace("cpu", "gpu")
        result = outputs[0][:, index]
        assert all(torch.equal(result, other[:, index]) for other in outputs[1:]), option
        # Whole numbers are exact. Signs are of values far from zero, so that rounding turns none; only sums differ.
        np.testing.assert_allclose(
            result, expected(text, codec, numel, steps, **shape), rtol=0, atol=0 if codec == SPARSE else 1e-5, err_msg=str(option)
        )


@pytest.mark.parametrize("codec", [SIGN, SPARSE], ids=lambda codec: codec.name)
def test_all_4341_options_give_what_their_maths_gives(cluster, codec):
    """With the host as a device of its own, so that every text takes another way."""
    assert len(EVERY) == 4341
    hosts = [SeparateHost() for _ in range(4)]
    numel, units = 13, units_of(EVERY, 13)
    given = gradients(1, 4, numel, whole=codec == SPARSE)

    def work(groups):
        rank = groups.place.rank
        executor = executor_of(groups, units, codec, Feedback("none"), offload=hosts[rank])
        return synchronised(executor, units, given[:, rank], at_once=200)

    check(EVERY, cluster.run(work), codec, numel, steps=1)
    assert all(host.copies > 4341 for host in hosts)


@pytest.mark.parametrize("codec", [SIGN, SPARSE], ids=lambda codec: codec.name)
@pytest.mark.parametrize("numel", [1, 6, 37])
def test_feedback_at_every_site_is_that_of_the_maths(cluster, codec, numel):
    options = [option for option in DISTINCT if not option.sums_payloads]
    outputs = [out for out, _ in run_all(cluster, options, numel, codec, gradients(3, 4, numel, whole=codec == SPARSE))]
    check(options, outputs, codec, numel, steps=3)


@pytest.mark.parametrize(("nodes", "ranks_per_node"), [(2, 2), (1, 3), (3, 1), (2, 3)])
def test_lossless_options_give_the_sum_on_clusters_of_every_shape(nodes, ranks_per_node):
    world = nodes * ranks_per_node
    cluster = Cluster(nodes, ranks_per_node, DISTINCT)
    try:
        for numel in (1, world - 1 or 1, 29):
            given = gradients(2, world, numel, whole=True)
            for outputs, _ in run_all(cluster, DISTINCT, numel, Identity(), given):
                assert (outputs == given.sum(1)[:, None]).all()
    finally:
        cluster.close()


def test_uneven_clusters_follow_the_maths_too():
    cluster = Cluster(2, 3, DISTINCT)
    options = [option for option in DISTINCT if not option.sums_payloads][::3]
    try:
        outputs = [out for out, _ in run_all(cluster, options, 41, SIGN, gradients(2, 6, 41))]
        check(options, outputs, SIGN, 41, steps=2, nodes=2, ranks_per_node=3)
    finally:
        cluster.close()


def test_hierarchical_options_lose_nothing_with_feedback(cluster):
    """Inputs = outputs + all residuals, element by element, over eight steps."""
    numel, steps = 37, 8
    options = [option for option in HIERARCHICAL if option.compresses and not option.sums_payloads]
    given = gradients(steps, 4, numel, whole=True)
    results = run_all(cluster, options, numel, SPARSE, given)
    held = [feedback.state_dict()["sites"] for _, feedback in results]
    for index, option in enumerate(options):
        kept = torch.zeros(numel)
        for rank, sites in enumerate(held):
            for todo in path(option, numel, index, Place(2, 2, rank)).steps:
                if isinstance(todo, Encode):
                    # What is compressed once the nodes have the same is compressed alike on each of them.
                    copies = 2 if any(a.at is Level.INTER for a in option.actions[: todo.number]) and in_full(option, todo) else 1
                    for row, target in enumerate(todo.targets):
                        if target.numel:
                            residual = sites[f"t{index}/{todo.compression}/{row}"]["residual"]
                            kept[target.start : target.stop] += residual / copies
        assert torch.equal(results[0][0][:, index].sum(0) + kept, given.sum((0, 1))), option


def in_full(option, todo) -> bool:
    """Whether the scheme between nodes is complete before the action."""
    following = option.actions[todo.number :]
    return all(action.at is not Level.INTER for action in following)


@pytest.mark.parametrize("mode", ["none", "ef"])
def test_ranks_stay_equal_though_each_draws_numbers_of_its_own(cluster, mode):
    """Also where two nodes compress the same sum once more."""
    codec = QSGD(4) if mode == "none" else registry.make(CompressorSettings(name="randomk", density=0.3))
    options = [option for option in HIERARCHICAL if option.compresses and (codec.sum_dtype or not option.sums_payloads)]
    outputs = [out for out, _ in run_all(cluster, options, 37, codec, gradients(2, 4, 37), mode)]
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])
    assert not torch.equal(outputs[0][0], outputs[0][1])


def test_ranks_draw_apart_where_their_payloads_meet(cluster):
    """The errors of four ranks with the same gradient average out, so their draws differ."""
    given = torch.linspace(0, 1, 200).expand(1, 4, 200)
    (outputs, _), *_ = run_all(cluster, [Option.parse("C.gpu AG.flat D.gpu")], 200, QSGD(2), given, "none")
    assert len(outputs.unique()) > 2  # drawing alike, they would send nothing or four times one level


@pytest.mark.parametrize(
    "text",
    [
        "C.gpu AG.flat D.gpu",
        "C.gpu GA.flat D.gpu C.gpu BC.flat D.gpu",
        "C.gpu A2A.intra A2A.inter D.gpu C.gpu AG.inter AG.intra D.gpu",
        "RS.intra C.gpu A2A.inter D.gpu C.gpu AG.inter D.gpu AG.intra",
        "C.gpu GA.intra D.gpu C.gpu AG.inter D.gpu C.gpu BC.intra D.gpu",
    ],
)
def test_ef21_converges_to_the_sum_of_constant_gradients(cluster, text):
    given = gradients(1, 4, 50).expand(80, 4, 50)
    for outputs, _ in run_all(cluster, [Option.parse(text)], 50, SPARSE, given, "ef21"):
        errors = (outputs[:, 0] - given[0].sum(0)).norm(dim=1)
        assert errors[0] > 1 and errors[-1] < 1e-3


def test_density_that_falls_with_the_steps_sends_less_in_the_same_buffers(cluster):
    codec = registry.make(CompressorSettings(name="dgc", density=0.05, warmup_steps=4))
    texts = ("C.gpu AG.flat D.gpu", "C.gpu A2A.intra A2A.inter D.gpu C.gpu AG.inter AG.intra D.gpu")
    given = gradients(6, 4, 200)
    outputs = [out for out, _ in run_all(cluster, [Option.parse(text) for text in texts], 200, codec, given)]
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])
    sent = [(out != 0).sum().item() for out in outputs[0][:, 0]]
    assert sent[0] > 100 > 40 >= sent[-1]


class Allocations(TorchDispatchMode):
    """Names of all operations of this thread whose results lie in memory that none of their arguments had."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in flat((args, kwargs or {}))}
        self.found += [str(func) for x in flat(result) if x.numel() and x.untyped_storage().data_ptr() not in given]
        return result


def flat(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return flat(list(value.values()))
    return [x for item in value for x in flat(item)] if isinstance(value, tuple | list) else []


class Raw(Codec):
    """fp32 as it is, in operations that allocate nothing, so that all allocations are the runtime's."""

    name = "raw"
    contractive = True

    def payload_nbytes(self, numel):
        return 4 * numel

    def encode(self, x, payload, seed, residual=None, kept=None):
        torch.add(x, residual, out=payload.view(torch.float32))
        kept.zero_()

    def decode_add(self, payload, out, seed):
        out.add_(payload.view(torch.float32))


NATIVE = pytest.mark.skipif(library() is None, reason="plain torch allocates")


@pytest.mark.parametrize(
    ("codec", "wire", "host"),
    [(Raw(), torch.float32, None), (Raw(), torch.bfloat16, SeparateHost), pytest.param(SIGN, torch.bfloat16, None, marks=NATIVE)],
    ids=["raw", "raw, bfloat16, host apart", "efsignsgd, bfloat16"],
)
def test_nothing_is_allocated_once_it_runs(cluster, codec, wire, host):
    """Neither by torch nor, beyond a few kB for what Python caches, by Python, in 50 steps of 8 options."""
    options = [option for option in EVERY if option.levels != {Level.FLAT}][::600]
    units = units_of(options, 1003)

    def work(groups):
        compressor = Compressor(codec, Feedback("ef"), 0)
        executor = Executor(units, [compressor], groups, wire, offload=host and host())
        xs = [torch.ones(executor.buffer_numel(unit), dtype=unit.dtype(wire)) for unit in units]
        before = executor.buffer_nbytes
        for step in range(3):
            drive(executor, units, xs, step)
        with Allocations() as allocations:
            drive(executor, units, xs, 3)
            assert not allocations.found
        kept = tracemalloc.get_traced_memory()[0]
        for step in range(4, 54):
            for x in xs:
                x.fill_(1.0)
            drive(executor, units, xs, step)
        assert executor.buffer_nbytes == before
        return tracemalloc.get_traced_memory()[0] - kept

    tracemalloc.start()
    try:
        assert all(growth < 64 * 1024 for growth in cluster.run(work))
    finally:
        tracemalloc.stop()


def test_a_test_that_allocates_is_noticed():
    with Allocations() as allocations:
        torch.ones(3).add_(1)[1:].clone()
    assert len(allocations.found) == 2


class Growing(Largest):
    name = "growing"

    def at(self, step):
        return Largest(self.k + step)


def test_a_codec_whose_payloads_grow_is_refused(cluster):
    units = units_of([Option.parse("C.gpu AG.flat D.gpu")], 100)
    with pytest.raises(UnsupportedError, match="growing: payloads of 100 elements grow from"):
        executor_of(cluster.groups[0], units, Growing(3), Feedback("none"))


UNFIT = {
    "C.gpu AR.flat D.gpu": (SPARSE, "it sums payloads"),
    "RS.intra C.gpu AG.inter D.gpu AG.intra": ("majority", "some ranks apart"),
    "C.gpu A2A.intra D.gpu AR.inter AG.intra": ("majority", "some ranks apart"),
    "C.gpu A2A.flat D.gpu C.gpu AG.flat D.gpu": ("mean", "whose size would be lost"),
    "RS.flat C.gpu AG.flat D.gpu": ("mean", "whose size would be lost"),
    "P.gpu AR.flat Q.gpu AR.flat D.gpu": (SPARSE, "tasks of powersgd"),
}


@pytest.mark.parametrize("text", UNFIT)
def test_what_cannot_be_right_is_refused(cluster, text):
    codec, why = UNFIT[text]
    if isinstance(codec, str):
        codec = registry.make(CompressorSettings(name="signsgd", vote=codec))
    with pytest.raises(UnsupportedError, match=f"t0: option {text}.*{why}"):
        executor_of(cluster.groups[0], units_of([Option.parse(text)], 100), codec, Feedback("none"))


MAJORITIES = ("C.gpu AG.flat D.gpu", "C.gpu A2A.flat AG.flat D.gpu", "C.gpu A2A.intra GA.inter D.gpu BC.inter AG.intra")


@pytest.mark.parametrize("vote", ["majority", "mean"])
def test_votes_count_the_same_on_every_way_that_is_not_refused(cluster, vote):
    codec = registry.make(CompressorSettings(name="signsgd", vote=vote))
    options = [option for option in DISTINCT if option.compresses and unfit(codec, option) is None]
    assert set(map(Option.parse, MAJORITIES)) <= set(options)
    given = gradients(1, 4, 37)
    (outputs, _), *_ = run_all(cluster, options, 37, codec, given, "none")
    counted = given.sign().sum(1)
    assert (outputs == (4 * counted.sign() if vote == "majority" else counted)).all()


def test_the_planner_offers_no_way_that_would_be_refused():
    profile = codecs_of(summable=False)
    (measured,) = profile.codecs
    trace, nested = trace_of([(2**20, 0.01)], world=4, node=2), nested_cluster_of()
    for vote in ("majority", "mean"):
        codec = registry.make(CompressorSettings(name="signsgd", vote=vote))
        told = measured.model_copy(update={"votes": codec.votes, "keeps_scale": False})
        menu = make_menu(trace, Costs(nested, profile.model_copy(update={"codecs": (told,)})))
        offered = {choice.option for choice in menu.choices if choice.option.compresses}
        tree = option_tree((Device.CPU,), summable=False)
        assert offered == {option for option in tree if option.compresses and unfit(codec, option) is None} != set()


class Log:
    """A recorder that keeps what it is given."""

    def __init__(self):
        self.spans = []

    def lane(self, number):
        return Writer(self, number)


class Writer:
    def __init__(self, log, lane):
        self.log, self.number = log, lane

    def span(self, step, unit, action, start_ns, end_ns):
        self.log.spans.append((step, unit, action, self.number, start_ns, end_ns))


def test_every_action_is_recorded_by_the_lane_that_finishes_it(cluster):
    text = "C.gpu GA.intra D.gpu C.gpu AG.inter D.gpu C.gpu BC.intra D.gpu"
    units, logs = units_of([Option.parse(text)], 100), [Log() for _ in range(4)]

    def work(groups):
        executor = executor_of(groups, units, SIGN, Feedback("ef"), recorder=logs[groups.place.rank])
        synchronised(executor, units, torch.ones(2, 100))

    cluster.run(work)
    for rank, log in enumerate(logs):
        actions = {0: 0, 1: 1, 2: 1, 3: 1, 4: 2, 5: 2, 6: 2, 7: 3, 8: 3}
        taken = actions if rank % 2 == 0 else {0: 0, 1: 1, 7: 3, 8: 3}  # the root does the rest
        assert [span[:4] for span in log.spans] == [(step, 0, *where) for step in (0, 1) for where in taken.items()]
        assert all(start < end for *_, start, end in log.spans)

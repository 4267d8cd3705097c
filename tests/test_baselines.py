"""The paper's baselines and crippled searches: what they are made of, and how they compare in the timeline."""

import pytest
from planner_cases import trace_of

from espresso_ds.core.errors import FileError
from espresso_ds.core.option import Device, Level, Option, Task
from espresso_ds.core.profile import CompressorProfile, Link
from espresso_ds.planner.baselines import BASELINES, CRIPPLED, MIN_COMPRESS_BYTES, myopic, outer_routines, payload_levels
from espresso_ds.planner.cost import Costs
from espresso_ds.planner.menu import Choice, Menu
from espresso_ds.planner.routine_models import nominal_cluster
from espresso_ds.planner.search import best_plan
from espresso_ds.planner.timeline import Unit, iteration_time
from espresso_ds.planner.tree import option_tree

SHAPES = [(2, 4), (4, 1), (1, 4)]
SIZES = (1 << 8, 1 << 20, MIN_COMPRESS_BYTES // 4, MIN_COMPRESS_BYTES // 4 - 1, 1 << 22, 1 << 12)
ALGORITHMS = {
    "push, pull": "C.{d} A2A.{l} D.{d} C.{d} AG.{l} D.{d}",
    "allgather": "C.{d} AG.{l} D.{d}",
    "plain": "AR.{l}",
}


def option_of(shape, scheme, device="gpu"):
    nested = min(shape) > 1
    inside = ALGORITHMS[scheme].format(d=device, l="inter" if nested else "flat")
    return Option.parse(f"RS.intra {inside} AG.intra" if nested else inside)


def codecs_of(gpu_s=2e-11, cpu_s=2e-10, share=0.02):
    """Codecs on both devices: a fixed 20 us, and seconds per element."""
    numel = [2**power for power in range(4, 27, 2)]

    def device(name, per_element):
        times = [2e-5 + per_element * n for n in numel]
        payload = [max(8, int(4 * n * share)) for n in numel]
        return dict(device=name, numel=numel, payload_nbytes=payload, encode_s=times, decode_s=times, contention=0.0)

    devices = [device("gpu", gpu_s), device("cpu", cpu_s)]
    codec = dict(compressor={"name": "topk", "density": 0.01}, summable=False, relative_error=0.9, devices=devices)
    return CompressorProfile(codecs=[codec])


def case(shape, gbit_per_s=10.0, codecs=None):
    """A trace and the menu of the full tree that a cluster of this shape has."""
    nodes, node = shape
    trace = trace_of(
        [(n, 0.004 * i) for i, n in enumerate(SIZES, 1)], world=nodes * node, node=node, device="cuda", forward_s=0.01
    )
    links = [
        Link(alpha_s=a, beta_s_per_byte=8e-9 / rate, fit_error=0.0) for a, rate in ((2e-5, 10 * gbit_per_s), (1e-4, gbit_per_s))
    ]
    costs = Costs(nominal_cluster(nodes, node, *links), codecs or codecs_of())
    nested = min(shape) > 1
    tree = [o for o in option_tree((Device.GPU, Device.CPU)) if nested or o.levels == {Level.FLAT}]
    return trace, Menu([Choice(option) for option in tree], costs)


def options(units):
    return [unit.option for unit in units]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", BASELINES)
def test_plans_cover_the_trace_in_order_and_none_beats_communication_in_no_time(name, shape):
    trace, menu = case(shape)
    units = BASELINES[name](trace, menu)
    assert units == [Unit.of(trace, i, i + 1, unit.option) for i, unit in enumerate(units)]
    assert trace.compute_s <= iteration_time(units, trace, menu.costs) < float("inf")


@pytest.mark.parametrize("shape", SHAPES)
def test_fp32_compresses_nothing(shape):
    trace, menu = case(shape)
    assert options(BASELINES["FP32"](trace, menu)) == [option_of(shape, "plain")] * len(SIZES)


@pytest.mark.parametrize("shape", SHAPES)
def test_byteps_compress_compresses_on_the_cpu_from_its_threshold_on(shape):
    trace, menu = case(shape)
    plain, pushed = option_of(shape, "plain"), option_of(shape, "push, pull", "cpu")
    assert options(BASELINES["BytePS-Compress"](trace, menu)) == [plain, pushed, pushed, plain, pushed, plain]


@pytest.mark.parametrize("shape", SHAPES)
def test_hitopkcomm_compresses_every_tensor(shape):
    trace, menu = case(shape)
    assert options(BASELINES["HiTopKComm"](trace, menu)) == [option_of(shape, "allgather")] * len(SIZES)


@pytest.mark.parametrize("shape", SHAPES)
def test_hipress_takes_the_cheapest_of_three_for_every_tensor_by_itself(shape):
    trace, menu = case(shape)
    three = [option_of(shape, scheme) for scheme in ALGORITHMS]
    seconds = [
        {option: sum(step.seconds for step in menu.costs.walk(option, tensor.numel).steps) for option in three}
        for tensor in trace.tensors
    ]
    chosen = options(BASELINES["HiPress"](trace, menu))
    assert chosen == [min(each, key=each.get) for each in seconds]
    assert 0 < sum(option.compresses for option in chosen) < len(chosen)


def test_hipress_compresses_what_is_hidden_anyway_and_nothing_where_codecs_are_slow():
    trace, menu = case((2, 4))
    lazy = trace.model_copy(update={"tensors": trace.tensors[:5], "backward_s": 10.0})  # all is sent long before backward ends
    units = BASELINES["HiPress"](lazy, menu)
    assert any(unit.option.compresses for unit in units)
    assert iteration_time(units, lazy, menu.costs) > iteration_time(BASELINES["FP32"](lazy, menu), lazy, menu.costs)
    trace, menu = case((2, 4), codecs=codecs_of(gpu_s=1e-7, cpu_s=1e-7))
    assert BASELINES["HiPress"](trace, menu) == BASELINES["FP32"](trace, menu)


@pytest.mark.parametrize("shape", SHAPES)
def test_myopic_is_the_least_sum_of_seconds_of_every_choice(shape):
    trace, menu = case(shape)
    for unit in myopic(trace, menu):
        totals = [sum(step.seconds for step in menu.walk(place, unit.numel).steps) for place in range(len(menu.choices))]
        assert totals[menu.place[Choice(unit.option)]] == pytest.approx(min(totals), rel=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CRIPPLED)
def test_crippled_searches_have_fewer_choices_and_give_plans_of_them(name, shape):
    trace, menu = case(shape)
    keeps = CRIPPLED[name].keeps
    kept = [choice for choice in menu.choices if keeps(choice)]
    assert len(kept) < len(menu.choices) or name == "myopic"
    units = CRIPPLED[name].plan(trace, menu, lambda trace, menu: best_plan(trace, menu, fused=False))
    assert all(keeps(Choice(unit.option, unit.codec)) for unit in units)
    assert trace.compute_s <= iteration_time(units, trace, menu.costs) < float("inf")


def test_what_crippled_searches_keep_of_the_full_tree():
    _, menu = case((2, 4))
    kept = {name: {c.option for c in menu.choices if crippled.keeps(c)} for name, crippled in CRIPPLED.items()}
    plain = {c.option for c in menu.choices if not c.option.compresses}
    assert kept["all compressed"] == {c.option for c in menu.choices} - plain
    assert len(kept["GPU only"]) == len(kept["CPU only"]) == 174  # E's |C_gpu|
    assert kept["GPU only"] & kept["CPU only"] == plain
    for name, crippled in CRIPPLED.items():
        assert (plain <= kept[name]) == (name != "all compressed"), name
        assert any(option.compresses for option in kept[name]), crippled.dimension
    allgather, alltoall = (kept[f"{scheme} between nodes"] for scheme in ("allgather", "alltoall"))
    assert allgather & alltoall == plain
    assert option_of((2, 4), "allgather") in allgather and option_of((2, 4), "push, pull") in alltoall
    between, both = kept["compressed between nodes only"], kept["compressed inside and between"]
    assert between & both == plain and option_of((2, 4), "allgather", "cpu") in between
    assert Option.parse("C.gpu A2A.intra D.gpu C.gpu AG.inter D.gpu AG.intra") in both


@pytest.mark.parametrize(
    ("text", "routines", "levels"),
    [
        ("AR.flat", (Task.ALLREDUCE,), set()),
        ("RS.intra C.gpu AG.inter D.cpu AG.intra", (Task.ALLGATHER,), {Level.INTER}),
        ("RS.intra AR.inter C.gpu AG.intra D.gpu", (Task.ALLREDUCE,), {Level.INTRA}),
        (
            "C.gpu A2A.intra A2A.inter D.gpu C.gpu AG.inter D.gpu AG.intra",
            (Task.ALLTOALL, Task.ALLGATHER),
            {Level.INTRA, Level.INTER},
        ),
        ("RS.flat C.cpu AG.flat D.cpu", (Task.REDUCE_SCATTER, Task.ALLGATHER), {Level.FLAT}),
    ],
)
def test_routines_between_nodes_and_levels_of_payloads(text, routines, levels):
    assert outer_routines(Option.parse(text)) == routines
    assert payload_levels(Option.parse(text)) == levels


def test_a_menu_without_the_needed_choice_is_named():
    trace, menu = case((2, 4))
    own = Menu([choice for choice in menu.choices if "cpu" not in str(choice.option)], menu.costs)
    with pytest.raises(FileError, match=r"lacks 'RS\.intra C\.cpu A2A\.inter .*full tree"):
        BASELINES["BytePS-Compress"](trace, own)
    flat = Menu([Choice(Option.parse("AR.flat"))], menu.costs)
    with pytest.raises(FileError, match="'compress or not'"):
        CRIPPLED["all compressed"].plan(trace, flat, myopic)


def test_half_precision_on_the_wire_moves_the_threshold():
    trace, menu = case((2, 4))
    half = Menu(
        menu.choices,
        Costs(nominal_cluster(2, 4, *[Link(alpha_s=1e-4, beta_s_per_byte=1e-9, fit_error=0.0)] * 2), codecs_of(), "float16"),
    )
    compressed = [unit.option.compresses for unit in BASELINES["BytePS-Compress"](trace, half)]
    assert compressed == [2 * n >= MIN_COMPRESS_BYTES for n in SIZES] != [4 * n >= MIN_COMPRESS_BYTES for n in SIZES]


def test_the_full_search_is_no_slower_than_any_baseline_or_crippled_search():
    trace, menu = case((2, 4), gbit_per_s=2.0)
    full = iteration_time(best_plan(trace, menu, fused=False), trace, menu.costs)
    for name, baseline in BASELINES.items():
        assert full <= iteration_time(baseline(trace, menu), trace, menu.costs), name
    slowed = 0
    for name, crippled in CRIPPLED.items():
        time = iteration_time(crippled.plan(trace, menu, lambda t, m: best_plan(t, m, fused=False)), trace, menu.costs)
        assert full <= time * 1.001, name
        slowed += time > full * 1.02
    assert slowed >= 3

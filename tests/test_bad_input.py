"""Whatever the files hold: one error that names the fault, or a plan that can be believed. Nothing else is ever raised."""

import copy
import json
import math
import re

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from planner_cases import cluster_of, codecs_of, nested_cluster_of, trace_of

from espresso_ds.core.config import Constraints, EspressoBlock
from espresso_ds.core.errors import EspressoError, FileError
from espresso_ds.core.option import Level, Option
from espresso_ds.core.profile import ClusterProfile, CompressorProfile, ModelTrace
from espresso_ds.planner.build import make_plan

SMALL = {"sizes": (2**4, 2**12, 2**20)}
KINDS = {"trace": ModelTrace, "cluster": ClusterProfile, "codecs": CompressorProfile}


def files_of(trace, cluster, codecs):
    """The three profiles as their files hold them."""
    return {"trace": as_json(trace), "cluster": as_json(cluster), "codecs": as_json(codecs)}


def as_json(record):
    return json.loads(record.model_dump_json())


def good(world=2, node=1, rows=((2**18, 0.02), (2**10, 0.04), (2**20, 0.05))):
    """Files of a small model on a slow link."""
    trace = trace_of(list(rows), world=world, node=node, forward_s=0.01, after_s=0.001)
    if node > 1 and world > node:
        cluster = nested_cluster_of(nodes=world // node, node=node, alpha_s=(1e-5, 1e-4), bytes_per_s=(1e9, 1e8), **SMALL)
    else:
        cluster = cluster_of(world=world, node=node, alpha_s=1e-4, bytes_per_s=1e8, **SMALL)
    return files_of(trace, cluster, codecs_of(encode=1e-9, decode=1e-9, contention=0.5, **SMALL))


def planned(files, **more):
    """The plan, or the error. Files go through their text, where NaN and Infinity may stand as Python writes them."""
    try:
        records = [kind.from_json(json.loads(json.dumps(files[name])), f"{name}.json") for name, kind in KINDS.items()]
        return make_plan(*records, made_by="tests", **more)
    except EspressoError as error:
        return error


def check(result):
    """A plan whose figures can be believed, or an error of one clear line."""
    if isinstance(result, EspressoError):
        assert 20 < len(str(result)) and "\n" not in str(result).strip()
        return
    p = result.predicted
    figures = [p.compute_s, p.stock_s, p.uncompressed_s, p.planned_s, p.lower_bound_s, p.free_compression_s]
    assert all(map(math.isfinite, figures)), figures
    assert 0 < p.lower_bound_s <= p.planned_s * (1 + 1e-9)
    assert p.planned_s <= p.uncompressed_s * (1 + 1e-9)
    assert p.compute_s <= p.lower_bound_s * (1 + 1e-9)
    assert all(map(math.isfinite, (tensor.saves_s for tensor in result.tensors)))
    result.check("plan")
    json.dumps(result.model_dump(mode="json"), allow_nan=False)


def places(value, path=()):
    """Paths of all numbers in a file."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from places(inner, (*path, place))
    elif isinstance(value, (int, float)):
        yield path


def put(value, path, new):
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = new


GOOD = good()
PLACES = [(name, path) for name in KINDS for path in places(GOOD[name])]
ODD = st.one_of(
    st.sampled_from(
        [0, -1, -0.5, 1e-300, 5e-324, 1e9, 10**9, 1e15, 2**63, 10**30, 1e300, 1.7e308, math.nan, math.inf, -math.inf, None, "x"]
    ),
    st.floats(allow_nan=True, allow_infinity=True),
    st.integers(-(2**70), 2**70),
)


@example(changes=[(("cluster", ("routines", 0, "beta_s_per_byte")), 1.7e308)])
@given(changes=st.lists(st.tuples(st.sampled_from(PLACES), ODD), min_size=1, max_size=2))
@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_any_number_of_any_file_may_be_anything(changes):
    files = copy.deepcopy(GOOD)
    for (name, path), new in changes:
        assume(path[-1] != "numel" or not isinstance(new, (int, float)) or new <= 10**10)  # larger ones: below
        put(files[name], path, new)
    check(planned(files))


@pytest.mark.parametrize("numel", [10**13, 2**62, 2**63, 10**30])
def test_tensors_larger_than_any_memory_are_refused(numel):
    files = copy.deepcopy(GOOD)
    put(files["trace"], ("tensors", 1, "numel"), numel)
    result = planned(files)
    assert isinstance(result, EspressoError) and str(numel) in str(result), result


@given(
    rows=st.lists(
        st.tuples(st.one_of(st.integers(1, 2**22), st.integers(10**9 - 2, 10**9 + 2)), st.floats(0, 0.2)), min_size=1, max_size=6
    ),
    shape=st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2), (8, 1)]),
    alpha=st.floats(0, 1),
    rate=st.floats(1e-3, 1e15),
    encode=st.floats(1e-15, 1e3),
    share=st.floats(1e-6, 10),
    contention=st.floats(0, 100),
    forward=st.floats(0, 10),
    dtypes=st.lists(st.sampled_from(["float32", "bfloat16"]), min_size=6, max_size=6),
)
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_extreme_but_sound_profiles_get_a_plan(rows, shape, alpha, rate, encode, share, contention, forward, dtypes):
    """Links of a byte in a quarter of an hour to a petabyte a second, codecs likewise, tensors of a thousand million elements."""
    world, node = shape
    trace = trace_of(rows, world=world, node=node, forward_s=forward, backward_s=0.2, dtypes=dtypes[: len(rows)])
    if world > node > 1:
        cluster = nested_cluster_of(
            nodes=world // node, node=node, alpha_s=(alpha, alpha), bytes_per_s=(rate, rate), contention=contention, **SMALL
        )
    elif world > 1:
        cluster = cluster_of(world=world, node=node, alpha_s=alpha, bytes_per_s=rate, contention=contention, **SMALL)
    else:
        cluster = cluster_of(world=1, node=1, alpha_s=alpha + 1e-9, bytes_per_s=rate, contention=contention, **SMALL)
    codecs = codecs_of(encode=encode, decode=encode / 3, share=share, contention=contention, **SMALL)
    result = planned(files_of(trace, cluster, codecs))
    assert not isinstance(result, EspressoError), result
    check(result)
    assert [tensor.name for tensor in result.tensors] == [t.name for t in sorted(trace.tensors, key=lambda t: t.ready_s)]


@pytest.mark.parametrize(
    ("name", "path", "new", "message"),
    [
        ("trace", ("tensors", 1, "ready_s"), -0.5, r"trace\.json: tensors\.1\.ready_s is -0\.5"),
        ("trace", ("tensors", 0, "ready_s"), math.nan, r"tensors\.0\.ready_s is nan"),
        (
            "trace",
            ("tensors", 2, "ready_s"),
            50.0,
            r"'t2' is ready after 50 s, but backward takes 0\.05 s; give all times in seconds",
        ),
        ("trace", ("backward_s",), 0, r"backward_s is 0"),
        ("trace", ("backward_s",), math.inf, r"backward_s is inf"),
        ("trace", ("tensors", 0, "numel"), 0, r"tensors\.0\.numel is 0"),
        ("trace", ("tensors",), [], r"holds no tensors.*espresso trace"),
        ("trace", ("wire_dtype",), "float8", r"wire_dtype is 'float8'; did you mean 'float\d+'"),
        ("trace", ("world_size",), 4, r"traced with 4 ranks \(1 per node\).*of 2 ranks"),
        ("cluster", ("routines", 0, "seconds", 1), math.nan, r"routines\.0\.seconds\.1 is nan"),
        ("cluster", ("routines", 0, "seconds", 1), math.inf, r"routines\.0\.seconds\.1 is inf"),
        ("cluster", ("routines", 0, "beta_s_per_byte"), math.inf, r"routines\.0\.beta_s_per_byte is inf"),
        (
            "cluster",
            ("routines", 0, "nbytes"),
            [64, 16, 1024],
            r"AR\.flat of 2 ranks: sample sizes \[64, 16, 1024\] do not ascend",
        ),
        ("cluster", ("routines", 0, "seconds"), [1.0], r"columns have lengths 3, 1"),
        ("cluster", ("routines",), [], r"AR\.flat|no routine of an uncompressed option was measured"),
        ("cluster", ("hosts",), [], r"traced with 2 ranks|hosts"),
        ("codecs", ("codecs", 0, "devices", 0, "encode_s", 0), -1e-6, r"encode_s\.0 is -1e-06"),
        ("codecs", ("codecs", 0, "devices", 0, "numel"), [4, 2, 1], r"sample sizes \[4, 2, 1\] do not ascend"),
        ("codecs", ("codecs", 0, "devices"), [], r"topk was measured on no device.*espresso profile compressors"),
        ("codecs", ("codecs",), [], r"codecs is \[\]"),
    ],
)
def test_faults_are_named(name, path, new, message):
    files = copy.deepcopy(GOOD)
    put(files[name], path, new)
    result = planned(files)
    assert isinstance(result, EspressoError), result
    check(result)
    assert re.search(message, str(result)), str(result)


def test_an_unknown_key_below_a_key_of_ones_own_is_named():
    block = {"pipeline": {"boundaries": {"0": {"forwrad": {"name": "topk"}}}}}
    with pytest.raises(FileError, match=r"unknown key 'pipeline\.boundaries\.0\.forwrad'; did you mean 'forward'"):
        EspressoBlock.read(block, "ds.json")


def test_milliseconds_beside_seconds_are_noticed():
    files = copy.deepcopy(GOOD)
    for tensor in files["trace"]["tensors"]:
        tensor["ready_s"] *= 1e3
    result = planned(files)
    assert isinstance(result, EspressoError) and "give all times in seconds" in str(result)


def test_tensors_out_of_order_are_put_in_order():
    rows = [(2**10, 0.05), (2**18, 0.01), (2**12, 0.03), (2**16, 0.01)]
    check(result := planned(good(rows=rows)))
    assert [tensor.name for tensor in result.tensors] == ["t1", "t3", "t2", "t0"]


def test_samples_that_fall_again_are_used():
    """Larger messages that took less time than small ones, as noise has it."""
    files = copy.deepcopy(GOOD)
    for routine in files["cluster"]["routines"]:
        routine["seconds"] = routine["seconds"][::-1]
    check(planned(files))


def test_a_link_of_next_to_no_bandwidth_still_gets_a_plan():
    trace = trace_of([(2**18, 0.02), (2**20, 0.05)])
    result = planned(files_of(trace, cluster_of(bytes_per_s=1e-6, **SMALL), codecs_of(**SMALL)))
    check(result)
    assert any("C." in tensor.option for tensor in result.tensors)


@pytest.mark.parametrize("world", [1, 2])
def test_one_gpu_has_nothing_to_send(world):
    """Or two behind a fast link: nothing is compressed."""
    trace = trace_of([(2**18, 0.02), (2**20, 0.05)], world=world, node=world)
    cluster = cluster_of(world=world, node=world, alpha_s=1e-6, bytes_per_s=1e9, **SMALL)
    result = planned(files_of(trace, cluster, codecs_of(encode=1e-7, **SMALL)))
    check(result)
    assert not any("C." in tensor.option for tensor in result.tensors)
    assert all(Option.parse(tensor.option).levels == {Level.FLAT} for tensor in result.tensors)


def test_tensors_of_a_thousand_million_elements():
    rows = [(10**9, 0.02), (1, 0.03), (10**9 + 1, 0.04)]
    for world, node in ((2, 1), (4, 2)):
        check(result := planned(good(world, node, rows)))
        assert not isinstance(result, EspressoError)
        assert result.predicted.stock_s > 2 * 4 * 10**9 / 1e8 * 0.5


def test_thousands_of_equal_tensors():
    rows = [(2**12, 0.0001 * (i + 1)) for i in range(2000)]
    check(result := planned(good(rows=rows), constraints=Constraints(max_compressions=1)))
    assert not isinstance(result, EspressoError)
    assert len(result.tensors) == 2000
    assert result.predicted.planned_s < result.predicted.stock_s

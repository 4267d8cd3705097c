"""Which groups a rank is in, and whether ranks lie as hierarchical options take them to."""

import pytest
import torch.distributed as dist
from plans import PREDICTION

from espresso_ds.compressors.identity import Identity
from espresso_ds.core.config import CompressorSettings
from espresso_ds.core.errors import FileError, MismatchError
from espresso_ds.core.option import Level, Option
from espresso_ds.core.plan import MadeFor, Plan, TensorDecision
from espresso_ds.feedback import Feedback
from espresso_ds.integrations import engine, engine_facts
from espresso_ds.integrations.engine_facts import Layout
from espresso_ds.runtime.executor import Compressor
from espresso_ds.runtime.groups import needed
from espresso_ds.runtime.paths import Encode, Place, path


def test_a_rank_is_where_its_groups_say():
    for rank in range(6):
        place = Place(nodes=2, ranks_per_node=3, rank=rank)
        for level in Level:
            (group,) = [ranks for ranks in place.groups(level) if rank in ranks]
            assert group[place.position(level)] == rank and len(group) == place.size(level)
            assert sorted(member for ranks in place.groups(level) for member in ranks) == list(range(6))
    assert Place(2, 3, 0).groups(Level.INTRA) == [[0, 1, 2], [3, 4, 5]]
    assert Place(2, 3, 0).groups(Level.INTER) == [[0, 3], [1, 4], [2, 5]]


def test_roots_take_turns_at_every_level():
    option = Option.parse("C.cpu GA.intra GA.inter D.cpu C.cpu BC.inter BC.intra D.cpu")
    for index in range(12):
        decoding = [
            rank for rank in range(6) if any(isinstance(step, Encode) and step.number == 4 for step in walk(option, index, rank))
        ]
        assert decoding == [index % 2 * 3 + index % 3]


def walk(option, index, rank):
    return path(option, 10, index, Place(nodes=2, ranks_per_node=3, rank=rank)).steps


def test_only_the_groups_that_some_routine_needs():
    texts = ("AR.flat", "RS.intra C.cpu AG.inter D.cpu AG.intra")
    wanted = [(0, Level.FLAT), (0, Level.INTRA), (1, Level.INTER), (2, Level.INTRA)]
    assert needed(map(Option.parse, texts)) == wanted == needed(map(Option.parse, texts[::-1]))


@pytest.mark.parametrize(
    ("hosts", "layout"),
    [("aabb", Layout(2, 2, True)), ("abab", Layout(2, 2, False)), ("abba", Layout(2, 2, False)), ("abc", Layout(3, 1, True))],
)
def test_whether_the_ranks_of_a_host_follow_each_other(monkeypatch, hosts, layout):
    monkeypatch.setattr(dist, "get_world_size", lambda: len(hosts))
    monkeypatch.setattr(dist, "all_gather_object", lambda told, _: told.__setitem__(slice(None), hosts))
    assert engine_facts.layout() == layout


BARE = Compressor(Identity(), Feedback("none"), 0)


def plan_with(option):
    decision = TensorDecision(name="w", shape=(4,), dtype="float32", numel=4, option=option, unit=0)
    made_for = MadeFor(nodes=2, ranks_per_node=2, model="m", config={})
    settings = (CompressorSettings(name="identity"),)
    return Plan(made_by="tests", made_for=made_for, profiles={}, compressors=settings, predicted=PREDICTION, tensors=(decision,))


def test_hierarchical_options_are_refused_where_ranks_alternate_between_hosts():
    scattered, in_order = Layout(2, 2, in_order=False), Layout(2, 2, in_order=True)
    nested = plan_with("RS.intra AR.inter AG.intra")
    with pytest.raises(MismatchError, match=r"w: option .* works inside and between hosts"):
        engine.check_options(nested, [BARE], "cpu", scattered)
    engine.check_options(nested, [BARE], "cpu", in_order)
    engine.check_options(plan_with("AR.flat"), [BARE], "cpu", scattered)
    with pytest.raises(FileError, match="compresses on a GPU"):
        engine.check_options(plan_with("C.gpu AG.flat D.gpu"), [BARE], "cpu", in_order)

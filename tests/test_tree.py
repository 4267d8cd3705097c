"""The option tree has the paper's counts and exactly the paths of its grammar, and constraints prune it as they say."""

import random

import pytest

from espresso_ds.core.config import Constraints
from espresso_ds.core.errors import FileError
from espresso_ds.core.option import UNCOMPRESSED, Action, Device, Level, Option, Task
from espresso_ds.planner.tree import allowed, is_exact, option_tree

ONE, TWO = (Device.CPU,), (Device.GPU, Device.CPU)
PLAIN_SCHEMES = (("RS", "AG"), ("RD", "BC"))
PACKED_SCHEMES = (("A2A", "AG"), ("GA", "BC"))


def count_of_the_paper(d):
    """(flat, hierarchical) by E's recurrences for d devices."""
    a = 1 + d * d
    b = d + d * a
    t5 = a + d * b
    t4 = b + 2 * (b + d * t5)
    t3 = a + 2 * t5 + d * t4
    return 1 + 2 + 2 * d * d + d * d + 2 * d * (d + d**3 + d), 2 * t3 + d * 2 * (t4 + d * t3)


class Grammar:
    """All options as texts, spelled out from tables 2 and 3 by nested rules; apart from the planner's states and moves."""

    def __init__(self, devices, summable=False):
        self.pack, self.unpack = ([f"{task}.{device}" for device in devices] for task in "CD")
        self.summable = summable

    def after_packing(self, tails):
        return [f"{c} {tail}" for c in self.pack for tail in tails]

    def after_unpacking(self, tails):
        return [f"{d} {tail}".strip() for d in self.unpack for tail in tails]

    def close(self, second):
        """A dense tensor and the last routine."""
        return [second, *(f"{c} {second} {d}" for c in self.pack for d in self.unpack)]

    def close_packed(self, second):
        return [f"{second} {d}" for d in self.unpack] + self.after_unpacking(self.close(second))

    def complete(self, second, tail):
        """A dense tensor, the second routine between nodes, then that inside the node."""
        return [f"{second} {rest}" for rest in self.close(tail)] + [
            f"{c} {second} {rest}" for c in self.pack for rest in self.close_packed(tail)
        ]

    def across_packed(self, tail, fresh):
        single = ["AG.inter", *(["AR.inter"] if self.summable and fresh else [])]
        found = [f"{routine} {rest}" for routine in single for rest in self.close_packed(tail)]
        for first, second in PACKED_SCHEMES:
            ways = [f"{second}.inter {rest}" for rest in self.close_packed(tail)]
            ways += self.after_unpacking(self.complete(f"{second}.inter", tail))
            found += [f"{first}.inter {way}" for way in ways]
        return found

    def across(self, tail):
        """A dense tensor, all between nodes, then the last routine inside the node."""
        found = [f"AR.inter {rest}" for rest in self.close(tail)]
        found += [f"{first}.inter {rest}" for first, second in PLAIN_SCHEMES for rest in self.complete(f"{second}.inter", tail)]
        return found + self.after_packing(self.across_packed(tail, True))

    def flat(self):
        found = ["AR.flat"]
        for first, second in PLAIN_SCHEMES:
            found += [f"{first}.flat {rest}" for rest in self.close(f"{second}.flat")]
        for routine in ["AG", *(["AR"] if self.summable else [])]:
            found += self.after_packing([f"{routine}.flat {d}" for d in self.unpack])
        for first, second in PACKED_SCHEMES:
            found += self.after_packing([f"{first}.flat {rest}" for rest in self.close_packed(f"{second}.flat")])
        return found

    def hierarchical(self):
        found = [f"{first}.intra {rest}" for first, second in PLAIN_SCHEMES for rest in self.across(f"{second}.intra")]
        for first, second in PACKED_SCHEMES:
            tail = f"{second}.intra"
            ways = self.across_packed(tail, False) + self.after_unpacking(self.across(tail))
            found += self.after_packing([f"{first}.intra {way}" for way in ways])
        return found


def test_the_counts_of_the_paper():
    for devices, flat, whole in ((ONE, 12, 174), ((Device.GPU,), 12, 174), (TWO, 63, 4341)):
        tree = option_tree(devices)
        assert len(tree) == len(set(tree)) == whole
        assert sum(option.levels == {Level.FLAT} for option in tree) == flat
        assert tree[0] == UNCOMPRESSED


@pytest.mark.parametrize("d", [1, 2, 3])
def test_the_counts_follow_the_recurrences(d):
    """The edges do not depend on what the devices are, so that any three names give the counts of three devices."""
    tree = option_tree(tuple("xyz"[:d]))
    flat = sum(option.levels <= {Level.FLAT} for option in tree)
    assert (flat, len(tree) - flat) == count_of_the_paper(d)


@pytest.mark.parametrize("summable", [False, True])
@pytest.mark.parametrize("devices", [ONE, TWO])
def test_the_tree_is_that_of_the_grammar(devices, summable):
    grammar = Grammar(devices, summable)
    texts = grammar.flat() + grammar.hierarchical()
    assert len(texts) == len(set(texts))
    assert {str(option) for option in option_tree(devices, summable)} == set(texts)


def test_summable_options_are_an_addition():
    assert set(option_tree(TWO)) < set(option_tree(TWO, True))
    added = set(option_tree(TWO, True)) - set(option_tree(TWO))
    assert added == {option for option in option_tree(TWO, True) if option.sums_payloads}


@pytest.mark.parametrize("devices", [ONE, TWO])
def test_every_option_is_sound_and_round_trips(devices):
    for option in option_tree(devices, True):
        assert Option.parse(str(option)) == option
        option.check()
        assert {a.at for a in option.actions if isinstance(a.at, Device)} <= set(devices)
        assert 1 <= len(option.actions) <= 12


def test_uncompressed_comes_first_and_short_ones_before_long_ones():
    lengths = [len(option.actions) for option in option_tree(TWO)]
    assert lengths == sorted(lengths)
    assert [str(option) for option in option_tree(ONE)[:3]] == ["AR.flat", "RS.flat AG.flat", "RD.flat BC.flat"]


def test_a_mutated_option_is_in_the_tree_or_refused():
    """Drop, double, swap or replace an action of any option: `check` accepts what the tree holds and nothing else."""
    rng, tree = random.Random(2), option_tree(TWO, True)
    members, outcomes = set(tree), {True: 0, False: 0}
    words = sorted({action for option in tree for action in option.actions}, key=str)
    for _ in range(6000):
        actions = list(rng.choice(tree).actions)
        place, other = rng.randrange(len(actions)), rng.randrange(len(actions))
        match rng.randrange(4):
            case 0:
                del actions[place]
            case 1:
                actions.insert(place, actions[other])
            case 2:
                actions[place], actions[other] = actions[other], actions[place]
            case 3:
                actions[place] = rng.choice(words)
        mutant = Option(tuple(actions))
        accepted = True
        try:
            mutant.check()
        except FileError:
            accepted = False
        assert accepted == (mutant in members), str(mutant)
        outcomes[accepted] += 1
    assert min(outcomes.values()) > 300, "both outcomes were seen"


def test_all_short_sequences_are_in_the_tree_or_refused():
    """Every sequence of up to three actions."""
    words = [Action(task, place) for task in Task for place in (ONE if task in (Task.COMPRESS, Task.DECOMPRESS) else Level)]
    members, grown, found = set(option_tree(ONE, True)), [()], set()
    for _ in range(3):
        grown = [(*path, word) for path in grown for word in words]
        for path in grown:
            try:
                Option(path).check()
            except FileError:
                continue
            found.add(Option(path))
    assert found == {option for option in members if len(option.actions) <= 3}


def compressions(words):
    return sum(word.startswith("C.") for word in words)


@pytest.mark.parametrize(
    ("constraints", "stays"),
    [
        ({"max_compressions": 0}, lambda words: compressions(words) == 0),
        ({"max_compressions": 1}, lambda words: compressions(words) <= 1),
        ({"max_compressions": 2}, lambda words: compressions(words) <= 2),
        ({"flat_only": True}, lambda words: not any("int" in word for word in words)),
        ({"forbid": ("cpu",)}, lambda words: not any(word.endswith(".cpu") for word in words)),
        ({"forbid": ("GA",)}, lambda words: not any(word.startswith("GA.") for word in words)),
        ({"forbid": ("A2A.inter",)}, lambda words: "A2A.inter" not in words),
        ({"forbid": ("C.gpu", "inter")}, lambda words: not any(word == "C.gpu" or word.endswith(".inter") for word in words)),
        (
            {"forbid": ("AR", "D.cpu"), "max_compressions": 1},
            lambda words: not any(word.startswith("AR.") or word == "D.cpu" for word in words) and compressions(words) <= 1,
        ),
    ],
)
def test_constraints_prune_what_they_name(constraints, stays):
    tree = option_tree(TWO, True)
    left = allowed(tree, Constraints(**constraints), 4, 8)
    assert list(left) == [option for option in tree if stays(str(option).split())]
    assert 0 < len(left) < len(tree)


@pytest.mark.parametrize(("nodes", "ranks_per_node", "flat"), [(1, 8, True), (8, 1, True), (1, 1, True), (2, 2, False)])
def test_hierarchical_options_need_several_nodes_of_several_ranks(nodes, ranks_per_node, flat):
    left = allowed(option_tree(TWO), Constraints(), nodes, ranks_per_node)
    assert len(left) == (63 if flat else 4341)
    assert all(option.levels == {Level.FLAT} for option in left) == flat


@pytest.mark.parametrize(
    ("word", "message"),
    [("A2B", "did you mean 'A2A'"), ("cpuu", "did you mean 'cpu'"), ("A2A.inner", "'A2A.inner'"), ("zzz", "known: .*A2A.*intra")],
)
def test_words_that_do_not_exist_are_named(word, message):
    with pytest.raises(FileError, match=f"forbid has '{word}'.*"):
        allowed(option_tree(ONE), Constraints(forbid=("GA", word)), 2, 2)
    with pytest.raises(FileError, match=message):
        allowed(option_tree(ONE), Constraints(forbid=(word,)), 2, 2)


def test_constraints_that_leave_no_uncompressed_option_are_refused():
    for forbid, shape in ((("flat", "intra"), (2, 2)), (("flat",), (2, 1)), (("AR", "RS", "RD"), (4, 4))):
        with pytest.raises(FileError, match=r"forbid \[.*leaves no way to send a tensor uncompressed; remove one"):
            allowed(option_tree(TWO), Constraints(forbid=forbid), *shape)


def test_exact_names_are_matched_by_pattern():
    patterns = ("*norm*", "*.bias", "embed.weight")
    names = ["h.0.norm.weight", "fc.bias", "embed.weight", "bias", "fc.weight", "embed.weights", "FC.BIAS"]
    assert [is_exact(name, patterns) for name in names] == [True, True, True, False, False, False, False]
    assert not is_exact("anything", ())

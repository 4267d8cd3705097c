"""What each action handles and sends, against a literal run: small arrays moved between ranks, each contribution followed."""

from dataclasses import dataclass
from itertools import chain

import pytest
from planner_cases import cluster_of, codecs_of, nested_cluster_of

from espresso_ds.core.errors import FileError
from espresso_ds.core.option import Device, Level, Option, Task
from espresso_ds.planner.cost import Costs, Resource, Shape, operations
from espresso_ds.planner.tree import option_tree

ENCODE, DECODE, PAYLOAD_SHARE = 3.0, 0.5, 1 / 4  # seconds per element; payload bytes over raw bytes: one byte an element


@dataclass
class Payload:
    """Some elements, packed: for each the set of ranks whose gradients are in it."""

    values: dict[int, frozenset[int]]


Held = dict[int, frozenset[int]] | list[Payload] | None
"""What a rank holds: elements, payloads, or nothing that counts."""


@dataclass
class Did:
    """One action as it was carried out."""

    rows: int  # payloads that the busiest rank encoded, decoded or put in
    elements: int  # in one payload, or as they are
    groups: int  # at once
    received: int  # elements that came in from other ranks, over all ranks


class UnevenError(Exception):
    """Payloads cannot be handed out evenly."""


class Ranks:
    """Nodes of ranks that carry an option out on `numel` elements."""

    def __init__(self, shape: Shape, numel: int) -> None:
        self.shape, self.world, self.numel = shape, shape.world, numel
        self.held: list[Held] = [{e: frozenset({rank}) for e in range(numel)} for rank in range(self.world)]

    def run(self, option: Option) -> list[Did]:
        """Carry all out, each compression cut into as few payloads as do."""
        cuts: list[int] = []
        for place, action in enumerate(option.actions):
            if action.task is Task.COMPRESS:
                cuts.append(cuts_of(option, place, self.shape, self.numel, cuts))
        return self.carry_out(option.actions, cuts)

    def carry_out(self, actions, cuts):
        did, cuts = [], list(cuts)
        for action in actions:
            match action.task:
                case Task.COMPRESS:
                    did.append(self.compress(cuts.pop(0)))
                case Task.DECOMPRESS:
                    did.append(self.decompress())
                case _:
                    did.append(self.communicate(action.task, action.at))
        return did

    def compress(self, cuts):
        for rank, held in enumerate(self.held):
            if held is not None:
                keys = sorted(held)
                if len(keys) % cuts:
                    raise UnevenError
                self.held[rank] = [Payload({e: held[e] for e in part}) for part in parts_of(keys, cuts)]
        rows = next(held for held in self.held if held is not None)
        return Did(len(rows), len(rows[0].values), 1, 0)

    def decompress(self):
        most = max((held for held in self.held if held is not None), key=len)
        did = Did(len(most), len(most[0].values), 1, 0)
        for rank, held in enumerate(self.held):
            if held is not None:
                self.held[rank] = total(row.values for row in held)
        return did

    def groups(self, level):
        node = self.shape.ranks_per_node
        match level:
            case Level.FLAT:
                return [list(range(self.world))]
            case Level.INTRA:
                return [list(range(start, start + node)) for start in range(0, self.world, node)]
            case Level.INTER:
                return [list(range(local, self.world, node)) for local in range(node)]

    def communicate(self, task, level):
        groups = [group for group in self.groups(level) if any(self.held[rank] is not None for rank in group)]
        ranks = [rank for group in groups for rank in group if self.held[rank] is not None]
        puts = [self.held[rank] for rank in ranks]
        packed = isinstance(puts[0], list)
        rows = max(map(len, puts)) if packed else 0
        elements = len(puts[0][0].values) if packed else max(map(len, puts))
        received = sum(getattr(self, task.name.lower())(group) for group in groups)
        return Did(rows, elements, len(groups) if level is Level.INTER else 1, received)

    # Each moves what the ranks of a group hold, and returns how many elements came in from others. Sums travel piece by piece:
    # every rank gets its share of each other one's.

    def reduce_scatter(self, group):
        keys = sorted(self.held[group[0]])
        sums = total(self.held[rank] for rank in group)
        for rank, part in zip(group, parts_of(keys, len(group)), strict=True):
            self.held[rank] = {e: sums[e] for e in part}
        return (len(group) - 1) * len(keys)

    def allreduce(self, group):
        if isinstance(self.held[group[0]], list):
            assert all(len(self.held[rank]) == 1 for rank in group)
            sums = total(self.held[rank][0].values for rank in group)
            for rank in group:
                self.held[rank] = [Payload(sums)]
        else:
            sums = total(self.held[rank] for rank in group)
            for rank in group:
                self.held[rank] = dict(sums)
        return 2 * (len(group) - 1) * len(sums)

    def allgather(self, group):
        given = [self.held[rank] for rank in group]
        everything = list(chain(*given)) if isinstance(given[0], list) else total(given, disjoint=True)
        for rank in group:
            self.held[rank] = list(everything) if isinstance(everything, list) else dict(everything)
        return (len(group) - 1) * size(everything)

    def alltoall(self, group):
        given = [self.held[rank] for rank in group]
        shards = sorted({tuple(row.values) for row in given[0]})
        if len(shards) % len(group):
            raise UnevenError
        received = 0
        for place, (rank, mine) in enumerate(zip(group, parts_of(shards, len(group)), strict=True)):
            self.held[rank] = [row for rows in given for row in rows if tuple(row.values) in mine]
            others = [row for rows in given[:place] + given[place + 1 :] for row in rows if tuple(row.values) in mine]
            received += size(others)
        return received

    def reduce(self, group):
        sums = total(self.held[rank] for rank in group)
        return self._leave_to_root(group, sums, (len(group) - 1) * len(sums))

    def gather(self, group):
        rows = list(chain(*(self.held[rank] for rank in group)))
        return self._leave_to_root(group, rows, size(rows) - size(self.held[group[0]]))

    def _leave_to_root(self, group, held, received):
        for rank in group:
            self.held[rank] = None
        self.held[group[0]] = held
        return received

    def broadcast(self, group):
        held = self.held[group[0]]
        for rank in group:
            self.held[rank] = list(held) if isinstance(held, list) else dict(held)
        return (len(group) - 1) * size(held)


def parts_of(items, count):
    step = len(items) // count
    return [items[start : start + step] for start in range(0, len(items), step)]


def total(values, disjoint=False):
    """The sum; no contribution may be in it twice."""
    found = {}
    for value in values:
        for e, ranks in value.items():
            assert not found.get(e, frozenset()) & ranks, "a gradient would be added twice"
            assert not (disjoint and e in found)
            found[e] = found.get(e, frozenset()) | ranks
    return found


def size(held):
    return sum(len(row.values) for row in held) if isinstance(held, list) else len(held)


def cuts_of(option, place, shape, numel, earlier):
    """The least number of payloads of the compression at `place` with which all up to its D can be carried out."""
    stop = next(i for i in range(place, len(option.actions)) if option.actions[i].task is Task.DECOMPRESS)
    for cuts in range(1, shape.world + 1):
        try:
            Ranks(shape, numel).carry_out(option.actions[: stop + 1], [*earlier, cuts])
        except UnevenError:
            continue
        return cuts
    raise AssertionError(f"{option} cannot be carried out")


def slopes(name, level):
    """A price of its own for each routine and level."""
    return 1.0 + list(Task).index(Task(name)) / 8 + list(Level).index(Level(level)) / 3


def costs_for(shape):
    codecs = codecs_of(encode=ENCODE, decode=DECODE, share=PAYLOAD_SHARE, summable=True, sizes=(1, 1024))
    if min(shape) > 1:
        return Costs(nested_cluster_of(nodes=shape.nodes, node=shape.ranks_per_node, skew=slopes), codecs)
    return Costs(cluster_of(world=shape.world, node=shape.ranks_per_node), codecs)


@pytest.mark.parametrize("shape", [Shape(2, 2), Shape(3, 2), Shape(2, 3), Shape(3, 1), Shape(1, 4)], ids=str)
def test_every_option_of_the_tree_handles_and_sends_what_a_literal_run_does(shape):
    numel = 12 * shape.world
    costs = costs_for(shape)
    for option in option_tree((Device.CPU,), True):
        if min(shape) == 1 and option.levels != {Level.FLAT}:
            continue
        ranks = Ranks(shape, numel)
        did = ranks.run(option)
        everyone = frozenset(range(shape.world))
        assert all(held == dict.fromkeys(range(numel), everyone) for held in ranks.held), f"{option}: not the sum everywhere"
        found = [(op.rows, numel / op.divisor, op.groups) for op in operations(option, 0, shape)]
        assert found == [(one.rows, one.elements, one.groups) for one in did], str(option)

        walk = costs.walk(option, numel)
        assert walk.sent_bytes == pytest.approx(sum(map(received_bytes, option.actions, did)) / shape.world), str(option)
        expected = [seconds_of(action, one, costs) for action, one in zip(option.actions, did, strict=True)]
        assert [step.seconds for step in walk.steps] == pytest.approx(expected), str(option)


def received_bytes(action, one):
    return 0 if isinstance(action.at, Device) else one.received * (1 if one.rows else 4)


def seconds_of(action, one, costs):
    """By the straight lines that the profiles were made of."""
    if isinstance(action.at, Device):
        return one.rows * one.elements * (ENCODE if action.task is Task.COMPRESS else DECODE)
    nbytes = one.rows * one.elements if one.rows else 4 * one.elements
    return nbytes * costs.routine(action.task, action.at, one.groups).slope


def test_groups_at_once_pay_for_the_card_they_share():
    """Two ranks of a node send at once after a reduce-scatter; after a reduce the root does alone."""
    costs = costs_for(Shape(2, 2))
    scattered, rooted = (Option.parse(text) for text in ("RS.intra AR.inter AG.intra", "RD.intra AR.inter BC.intra"))
    both, one = (costs.walk(option, 100).steps[1].seconds for option in (scattered, rooted))
    assert both == pytest.approx(one), "half the bytes at half the bandwidth"
    cut = [row for row in nested_cluster_of().routines if not (row.level is Level.INTER and row.groups == 2)]
    without = Costs(nested_cluster_of().model_copy(update={"routines": tuple(cut)}), codecs_of())
    assert without.has(rooted) and not without.has(scattered)
    with pytest.raises(FileError, match=r"AR\.inter was not measured with 2 ranks in 2 groups at once.*espresso profile cluster"):
        without.walk(scattered, 100)


def test_resources():
    """Flat routines take the link between nodes, or that inside the node where there is but one."""
    options = [Option.parse(text) for text in ("RS.intra C.gpu A2A.inter AG.inter D.cpu AG.intra", "AR.flat")]
    for shape, flat in ((Shape(2, 2), Resource.INTER), (Shape(1, 4), Resource.INTRA)):
        costs = costs_for(shape)
        assert [costs.resource(op) for op in operations(options[1], 0, shape)] == [flat]
    costs = costs_for(Shape(2, 2))
    found = [costs.resource(op) for op in operations(options[0], 0, Shape(2, 2))]
    inside, between = Resource.INTRA, Resource.INTER
    assert found == [inside, Resource.COMPUTE, between, between, Resource.CPU, inside]


def test_free_codecs_leave_all_else_as_it_is():
    costs = costs_for(Shape(2, 2))
    free = costs.with_free_codecs()
    for option in option_tree((Device.CPU,)):
        for step, other in zip(costs.walk(option, 96).steps, free.walk(option, 96).steps, strict=True):
            assert other.seconds == (0.0 if isinstance(step.action.at, Device) else step.seconds)
    assert (free.contention, free.link_contention) == (0.0, costs.link_contention)
    assert costs.walk(option, 96).steps != free.walk(option, 96).steps

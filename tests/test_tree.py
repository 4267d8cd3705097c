"""The option tree has the paper's counts, and every path can be executed and written down."""

import pytest

from espresso_ds.core.errors import FileError
from espresso_ds.core.option import UNCOMPRESSED, Device, Option, Task
from espresso_ds.planner.tree import flat_options, summable_options

ONE, TWO = (Device.CPU,), (Device.GPU, Device.CPU)


@pytest.mark.parametrize(("devices", "count"), [((Device.GPU,), 12), (ONE, 12), (TWO, 63)])
def test_flat_counts_of_the_paper(devices, count):
    options = flat_options(devices)
    assert len(options) == len(set(options)) == count
    assert options[0] == UNCOMPRESSED


@pytest.mark.parametrize(("devices", "count"), [(ONE, 1), (TWO, 4)])
def test_summable_options_are_an_addition(devices, count):
    options = summable_options(devices)
    assert len(set(options)) == count
    assert not set(options) & set(flat_options(devices))
    assert all([a.task for a in o.actions] == [Task.COMPRESS, Task.ALLREDUCE, Task.DECOMPRESS] for o in options)


@pytest.mark.parametrize("devices", [ONE, TWO])
def test_every_option_is_sound_and_round_trips(devices):
    for option in (*flat_options(devices), *summable_options(devices)):
        assert Option.parse(str(option)) == option
        option.check()
        assert {a.at for a in option.actions if isinstance(a.at, Device)} <= set(devices)


def test_the_order_is_stable():
    assert [str(o) for o in flat_options(ONE)[:6]] == [
        "AR.flat",
        "RS.flat AG.flat",
        "RD.flat BC.flat",
        "RS.flat C.cpu AG.flat D.cpu",
        "RD.flat C.cpu BC.flat D.cpu",
        "C.cpu AG.flat D.cpu",
    ]
    assert flat_options(TWO) == flat_options(TWO)


def test_no_path_was_forgotten():
    """Brute force: of all sequences of up to seven flat actions, those that `check` accepts and that the tree's rules allow."""
    words = {"C.cpu", "D.cpu", "AR.flat", "AG.flat", "RS.flat", "RD.flat", "BC.flat", "A2A.flat", "GA.flat"}
    found, grown = set(), [()]
    for _ in range(7):
        grown = [(*path, word) for path in grown for word in words if not (path and path[-1] == word)]
        grown = [path for path in grown if _can_grow(path)]
        for path in grown:
            try:
                found.add(str(Option.parse(" ".join(path))))
            except FileError:
                continue
    tree = {str(o) for o in (*flat_options(ONE), *summable_options(ONE))}
    assert tree <= found
    # What `check` accepts beyond the tree compresses and decompresses with nothing sent in between.
    assert all("C.cpu D.cpu" in path for path in found - tree), found - tree


def _can_grow(path):
    """At most two routines, and C and D in turn."""
    routines = [word for word in path if word.endswith("flat")]
    codecs = [word[0] for word in path if word.endswith("cpu")]
    return len(routines) <= 2 and codecs == ["C", "D"] * (len(codecs) // 2) + ["C"] * (len(codecs) % 2)

"""What others do, as plans for the same timeline, and searches with one dimension taken away (E 5, figures 11 to 15).

Every tensor is a unit of its own, in the order of the wire, as in the systems themselves. Where hierarchical options do not
exist (one node, or one rank on each), the flat counterpart takes their place. The codec is the profile's first.

| plan            | every tensor goes                                            | source                                        |
|-----------------|--------------------------------------------------------------|-----------------------------------------------|
| FP32            | uncompressed                                                 | BytePS: Jiang et al., OSDI'20                 |
| BytePS-Compress | by push and pull, compressed on the CPU, if it is large      | the documents of BytePS, gradient compression |
| HiTopKComm      | compressed on the GPU and allgathered between nodes          | Shi et al., MLSys'21                          |
| HiPress         | the cheaper of uncompressed and compressed between nodes     | Bai et al., SOSP'21                           |

Push and pull over servers that share the workers' nodes is a divisible scheme between nodes: every node is the server of its
share of the tensor, the push is an alltoall (or reduce-scatter), the pull an allgather.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from ..core.errors import FileError
from ..core.option import CODEC_TASKS, Device, Level, Option, Task
from ..core.profile import ModelTrace
from .cost import Resource
from .improve import descend
from .limits import Limits
from .menu import Choice, Chosen, Menu
from .timeline import Unit
from .trials import Trials

MIN_COMPRESS_BYTES = 65536
"""BYTEPS_MIN_COMPRESS_BYTES: tensors of fewer bytes are pushed and pulled as they are."""

Baseline = Callable[[ModelTrace, Menu], list[Unit]]
"""A plan of the menu's choices for tensors in the order of the wire. Raises FileError if the menu lacks a choice it needs."""

Search = Callable[[ModelTrace, Menu], list[Unit]]
"""The same, from whatever choices the menu has."""


def fp32(trace: ModelTrace, menu: Menu) -> list[Unit]:
    """No compression: reduce-scatter inside the node, allreduce of the shards between nodes, allgather inside the node.

    BytePS without compression (E's baseline FP32). Its push and pull move as many bytes as the allreduce counted here.
    """
    return _alike(trace, _place(menu, "RS.intra AR.inter AG.intra", "AR.flat"), menu)


def byteps_compress(trace: ModelTrace, menu: Menu) -> list[Unit]:
    """Tensors of MIN_COMPRESS_BYTES or more are compressed on the CPU; the rest go as in `fp32`.

    Reduced inside the node, compressed, pushed; the server decompresses, sums and compresses; pulled, decompressed, gathered.
    """
    large = _place(
        menu, "RS.intra C.cpu A2A.inter D.cpu C.cpu AG.inter D.cpu AG.intra", "C.cpu A2A.flat D.cpu C.cpu AG.flat D.cpu"
    )
    least = MIN_COMPRESS_BYTES / menu.costs.element_bytes
    pairs = zip(fp32(trace, menu), _alike(trace, large, menu), strict=True)
    return [compressed if plain.numel >= least else plain for plain, compressed in pairs]


def hitopkcomm(trace: ModelTrace, menu: Menu) -> list[Unit]:
    """All tensors, however small: reduce-scatter, compress on the GPU, allgather between nodes, decompress, allgather."""
    return _alike(trace, _place(menu, "RS.intra C.gpu AG.inter D.gpu AG.intra", "C.gpu AG.flat D.gpu"), menu)


def hipress(trace: ModelTrace, menu: Menu) -> list[Unit]:
    """Compression on the GPU and between nodes only, where a tensor by itself is faster so: no overlap, no other tensors.

    Its two schemes, peer to peer and over servers, are allgather and alltoall then allgather.
    """
    hierarchical = ("C.gpu AG.inter D.gpu", "C.gpu A2A.inter D.gpu C.gpu AG.inter D.gpu", "AR.inter")
    flat = ("C.gpu AG.flat D.gpu", "C.gpu A2A.flat D.gpu C.gpu AG.flat D.gpu", "AR.flat")
    places = [_place(menu, f"RS.intra {inside} AG.intra", other) for inside, other in zip(hierarchical, flat, strict=True)]
    return _fastest_alone(trace, menu, menu.everything[places])


def myopic(trace: ModelTrace, menu: Menu) -> list[Unit]:
    """Every tensor gets the choice with the least sum of seconds for the tensor by itself: no overlap, no other tensors."""
    return _fastest_alone(trace, menu, menu.everything)


def descent(trace: ModelTrace, menu: Menu) -> list[Unit]:
    """The descent alone, from the myopic plan: for menus without the uncompressed choices that other searches begin with."""
    trials = Trials(myopic(trace, menu), trace, menu)
    descend(trials, menu, Limits(trace, menu))
    return trials.units


BASELINES: Mapping[str, Baseline] = {
    "FP32": fp32,
    "BytePS-Compress": byteps_compress,
    "HiTopKComm": hitopkcomm,
    "HiPress": hipress,
}
"""The paper's baselines. The menu is that of the full tree."""


class Crippled(NamedTuple):
    """A search without one dimension: over fewer choices, or without the timeline."""

    dimension: str
    keeps: Callable[[Choice], bool]
    search: Search | None = None  # in place of the full one

    def plan(self, trace: ModelTrace, menu: Menu, search: Search) -> list[Unit]:
        """What is left of `search`. Raises FileError if none of the menu's choices is."""
        left = [choice for choice in menu.choices if self.keeps(choice)]
        if not left:
            raise FileError(
                f"no choice of the menu is left without the dimension {self.dimension!r}; give the menu of the full tree"
            )
        return (self.search or search)(trace, Menu(left, menu.costs))


def _compresses(choice: Choice) -> bool:
    return choice.option.compresses


def _on_one(device: Device) -> Callable[[Choice], bool]:
    """Choices whose codec work, if any, is all on the device."""
    return lambda choice: all(action.at is device for action in choice.option.actions if action.task in CODEC_TASKS)


def _between_nodes(*routines: Task) -> Callable[[Choice], bool]:
    """Choices that compress nothing or use these routines between nodes."""
    return lambda choice: not choice.option.compresses or outer_routines(choice.option) == routines


def _packed_on(*levels: Level) -> Callable[[Choice], bool]:
    """Choices that compress nothing or send payloads on these levels, all of them and no others."""
    return lambda choice: not choice.option.compresses or payload_levels(choice.option) == set(levels)


CRIPPLED: Mapping[str, Crippled] = {
    "all compressed": Crippled("compress or not", _compresses, descent),
    "myopic": Crippled("compress or not", lambda choice: True, myopic),
    "GPU only": Crippled("device", _on_one(Device.GPU)),
    "CPU only": Crippled("device", _on_one(Device.CPU)),
    "allgather between nodes": Crippled("scheme", _between_nodes(Task.ALLGATHER)),
    "alltoall between nodes": Crippled("scheme", _between_nodes(Task.ALLTOALL, Task.ALLGATHER)),
    "compressed between nodes only": Crippled("where in the path", _packed_on(Level.INTER)),
    "compressed inside and between": Crippled("where in the path", _packed_on(Level.INTRA, Level.INTER)),
}
"""Figure 15: two searches for each of the four dimensions. The last two need nodes of several ranks to have any choice that
compresses."""


def outer_routines(option: Option) -> tuple[Task, ...]:
    """The routines that cross from node to node, in order."""
    return tuple(a.task for a in option.actions if a.task not in CODEC_TASKS and a.at is not Level.INTRA)


def payload_levels(option: Option) -> set[Level]:
    """The levels on which the option sends payloads."""
    levels, packed = set(), False
    for action in option.actions:
        if isinstance(action.at, Device):
            packed = action.task is Task.COMPRESS
        elif packed:
            levels.add(action.at)
    return levels


def _fastest_alone(trace: ModelTrace, menu: Menu, among: Chosen) -> list[Unit]:
    alone = {n: menu.weigh(n, among)[:, : len(Resource)].sum(axis=1) for n in {tensor.numel for tensor in trace.tensors}}
    best = {n: menu.choices[among[seconds.argmin()]] for n, seconds in alone.items()}
    return [Unit.of(trace, index, index + 1, *best[tensor.numel]) for index, tensor in enumerate(trace.tensors)]


def _place(menu: Menu, hierarchical: str, flat: str) -> int:
    """Where in the menu the choice for the cluster's shape is."""
    shape = menu.costs.shape
    text = hierarchical if min(shape) > 1 else flat
    place = menu.place.get(Choice(Option.parse(text)))
    if place is None:
        raise FileError(
            f"the menu lacks {text!r}, which the baseline is made of; give the menu of the full tree with both devices"
        )
    return place


def _alike(trace: ModelTrace, place: int, menu: Menu) -> list[Unit]:
    return [Unit.of(trace, index, index + 1, *menu.choices[place]) for index in range(len(trace.tensors))]

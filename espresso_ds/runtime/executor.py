"""The executor: runs every unit's option, flat or hierarchical, from this rank's gradient to the sum over all ranks (E 4.2).

What is to be done is worked out at the start (`paths`), and so is all memory that it takes (`buffers`); what remains for a step
is to follow the path (`carrier`).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..compressors.base import Codec
from ..compressors.identity import Identity
from ..compressors.parts import Parts
from ..compressors.powersgd import PowerSGD, Shape
from ..core.config import FeedbackMode
from ..core.errors import UnsupportedError
from ..core.option import ROUTINES, Level, Option
from ..feedback import Feedback, may_sum
from .buffers import allocate
from .carrier import Carrier
from .groups import Groups
from .lanes import Steps
from .low_rank import LowRank, LowRankCompressor
from .paths import Decode, Encode, path
from .plain import PLAIN_LANES, Plain
from .streams import Offload
from .trace import Recorder

_SEED_MIX = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio: spreads consecutive step numbers over all bits
_STREAM_MIX = 0xD1342543DE82EF95  # of another generator, so that no rank's sequence is another's, shifted


@dataclass(frozen=True)
class Compressor:
    """A codec, its error memory and the seed of its random choices. Several may share a memory: every unit has its own sites."""

    codec: Codec
    feedback: Feedback
    seed: int


_NONE = Compressor(Identity(), Feedback("none"), 0)


@dataclass(frozen=True)
class Unit:
    """Tensors that travel as one buffer: `numel` elements in all, `index` its place in the plan, `label` its name for people and
    for its residuals, `codec` which of the executor's compressors it uses, if its option compresses, `shapes` those of the
    tensors, for PowerSGD.
    """

    index: int
    label: str
    numel: int
    option: Option
    codec: int = 0
    shapes: tuple[Shape, ...] = ()

    @property
    def steps(self) -> int:
        """Number of communication steps."""
        return sum(action.task in ROUTINES for action in self.option.actions)

    def dtype(self, wire_dtype: torch.dtype) -> torch.dtype:
        """Of the unit's buffer: codecs work on float32."""
        return torch.float32 if self.option.compresses else wire_dtype


class Executor:
    """Runs units over the ranks of `groups`. Takes all its memory at once.

    Args:
        units: all that will ever run, alike on all ranks; their indices differ.
        compressors: what units choose from, alike on all ranks.
        groups: of this rank; at least those that the units' options need.
        wire_dtype: of what is sent uncompressed.
        device: of the units' buffers.
        recorder: gets the span of every action.
        offload: how codecs on the host come to the tensors; by default as `device` has it.
        guarded: whether compressed units may also be sent uncompressed, for as long as nothing is settled; `groups` then have
            what `PLAIN` needs.

    Raises:
        UnsupportedError: a codec that cannot be combined with its option, or one whose payloads grow while training goes on.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        compressors: Sequence[Compressor | LowRankCompressor],
        groups: Groups,
        wire_dtype: torch.dtype,
        device: torch.device | str = "cpu",
        recorder: Recorder | None = None,
        offload: Offload | None = None,
        guarded: bool = False,
    ) -> None:
        self._recorder = recorder
        device = torch.device(device)
        offload = offload or Offload(device)
        self._carriers: dict[int, Carrier] = {}
        self._compressors: dict[int, Compressor] = {}
        self._low_rank: dict[int, LowRank] = {}
        for unit in units:
            compressor = compressors[unit.codec] if unit.option.compresses else _NONE
            _check(unit, compressor)
            if isinstance(compressor, LowRankCompressor):
                tensors, memory = compressor.codec.layout(unit.shapes), compressor.feedback
                seed = _seed(compressor.seed, 0, unit)
                self._low_rank[unit.index] = LowRank(
                    unit.label, unit.option, tensors, device, memory, seed, groups.by_lane, offload
                )
                continue
            way = path(unit.option, unit.numel, unit.index, groups.place)
            codec = compressor.codec if unit.option.compresses else None
            buffers = allocate(way, codec, unit.dtype(wire_dtype), wire_dtype, device, offload)
            self._compressors[unit.index] = compressor
            self._carriers[unit.index] = Carrier(unit.label, way, buffers, compressor.feedback, groups.by_lane, offload)
        self._plain: Plain | None = None
        if guarded:
            numels = {u.index: u.numel for u in units if u.option.compresses and may_be_plain(compressors[u.codec])}
            self._plain = Plain(numels, groups.by_lane[0, Level.FLAT], groups.place.rank, wire_dtype, device)

    @property
    def buffer_nbytes(self) -> int:
        """Bytes that this rank keeps for payloads and for what is on the wire; units' own buffers and residuals come on top."""
        buffers = [carrier.buffers.nbytes for carrier in self._carriers.values()]
        plain = 0 if self._plain is None else self._plain.nbytes
        return sum(buffers) + sum(unit.factors.nbytes for unit in self._low_rank.values()) + plain

    def may_send_plain(self, unit: Unit) -> bool:
        """Whether the unit may be sent uncompressed as well."""
        return self._plain is not None and unit.index in self._plain.units

    def send_plain(self, units: Iterable[Unit]) -> None:
        """Send these uncompressed from the next step on, the others as planned. What feedback remembers stays for later."""
        assert self._plain is not None
        self._plain.sent = frozenset(unit.index for unit in units)

    def settle_on(self, units: Iterable[Unit]) -> None:
        """Send these uncompressed for good, together with what feedback remembers of them; give back what is not needed then."""
        assert self._plain is not None
        ways = {unit.index: self._low_rank.get(unit.index) or self._carriers[unit.index] for unit in units}
        if ways:
            self._plain.settle_on(ways)
        else:
            self._plain = None

    def committed(self) -> None:
        """The optimizer has taken the step."""
        for index in self._plain.committed() if self._plain is not None else ():
            self._carriers.pop(index, None)
            self._low_rank.pop(index, None)

    def keeps_scale(self, unit: Unit) -> bool:
        """Whether the sum of gradients half as large would be half the sum, but for rounding. Not where only signs are sent."""
        known = self._compressors.get(unit.index)  # PowerSGD's units are not among them
        return known is None or _keeps_scale(known.codec)

    def lanes_of(self, unit: Unit) -> int:
        """Number of the lane on which the unit's next step ends."""
        return PLAIN_LANES if self._plain is not None and unit.index in self._plain.sent else unit.steps

    def buffer_numel(self, unit: Unit) -> int:
        """Elements that the unit's buffer needs: more than `unit.numel` where uncompressed shards have to be equal."""
        return self._carriers[unit.index].path.buffer_numel if unit.index in self._carriers else unit.numel

    def reads_parts(self, unit: Unit) -> bool:
        """Whether `run` takes the unit's values where they lie apart, in its next step."""
        carrier = self._carriers.get(unit.index)
        if carrier is None or (self._plain is not None and unit.index in self._plain.sent):
            return False
        return carrier.reads_parts(self._compressors[unit.index].codec)

    def run(self, unit: Unit, x: Tensor, step: int, source: Parts | None = None) -> Steps:
        """Sum the unit over all ranks, in place; yields each communication step once it has started.

        Args:
            unit: what to synchronise.
            x: shape (buffer_numel(unit),), contiguous, on the executor's device; float32 where the option compresses, else of the
                wire dtype. Elements past `unit.numel` may be anything.
            step: counts optimizer steps, equal on all ranks.
            source: the unit's values, if they are not in `x` but lie apart, and `reads_parts`; released once they are read.
        """
        if self._plain is not None and unit.index in self._plain.sent:
            yield from self._plain.run(unit.index, x[: unit.numel], functools.partial(self._record, unit, step))
            return
        if unit.index in self._low_rank:
            yield from self._low_rank[unit.index].run(x, functools.partial(self._record, unit, step))
            return
        carrier, compressor = self._carriers[unit.index], self._compressors[unit.index]
        codec = compressor.codec.at(step)
        seed = _seed(compressor.seed, step, unit)
        lane = 0
        for todo in carrier.path.steps:
            start_ns = time.perf_counter_ns()
            with torch.profiler.record_function(f"espresso/{unit.option.actions[todo.number]}/{unit.label}"):
                if isinstance(todo, Encode):
                    own = 0 if codec.shared_seed else todo.stream * _STREAM_MIX
                    carrier.encode(todo, x if source is None else source, codec, (seed + todo.compression + own) % 2**63)
                    if source is not None:
                        source.release()
                        source = None
                elif isinstance(todo, Decode):
                    carrier.decode(todo, x, codec, (seed + todo.compression) % 2**63)
                else:
                    pending, finish = carrier.start(todo, x, codec)
            if not isinstance(todo, Encode | Decode):
                lane += 1
                yield pending
                finish()
                if not todo.takes_part:
                    continue
            self._record(unit, step, lane, todo.number, start_ns)

    def _record(self, unit: Unit, step: int, lane: int, action: int, start_ns: int) -> None:
        if self._recorder is not None:
            self._recorder.lane(lane).span(step, unit.index, action, start_ns, time.perf_counter_ns())


def _seed(seed: int, step: int, unit: Unit) -> int:
    return (seed + (step * 2**20 + unit.index) * _SEED_MIX) % 2**63


def _check(unit: Unit, compressor: Compressor | LowRankCompressor) -> None:
    """Raise UnsupportedError if the codec cannot be right on the way of the unit's option."""
    if why := unfit(compressor.codec, unit.option, compressor.feedback.mode):
        raise UnsupportedError(f"{unit.label}: option {unit.option} is wrong for {compressor.codec.name}: {why}; plan again")


def may_be_plain(compressor: Compressor | LowRankCompressor) -> bool:
    """Whether uncompressed gradients mean to the optimizer what decoded ones do: not where feedback is its momentum ("dgc"), nor
    where the codec keeps no scale (SignSGD), to which the learning rate has been fitted.
    """
    codec = compressor.codec
    return compressor.feedback.mode != "dgc" and (isinstance(codec, PowerSGD) or _keeps_scale(codec))


def _keeps_scale(codec: Codec) -> bool:
    return codec.contractive or codec.unbiased


def unfit(codec: Codec | PowerSGD, option: Option, mode: FeedbackMode = "none") -> str | None:
    """Why the codec with this feedback cannot be right on the way of the option, or None if it can."""
    if isinstance(codec, PowerSGD) or option.low_rank:
        fits = not option.compresses or (isinstance(codec, PowerSGD) and option.low_rank)
        return None if fits else f"P and Q are the tasks of {PowerSGD.name}, C is that of all others"
    return option.unfit_for(summable=may_sum(codec, mode), votes=codec.votes, keeps_scale=_keeps_scale(codec))

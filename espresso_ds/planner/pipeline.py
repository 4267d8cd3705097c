"""What crosses the boundaries of a pipeline, decided by the step's time as a whole (Property 3 of E, on the pipeline's timeline).

The menu of a boundary's direction is every measured codec that suits activations, and none. The search: the best pair for all
boundaries alike, then one direction of one boundary after the other as long as the step gets shorter; then what loses less, where
thrift leaves time for it. Kept to, unless the user loosens them: gradients lose less than activations, and TopK keeps at least a
tenth, with AQ-SGD three tenths (Rudakov et al., 2023: what is stronger costs accuracy).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ..core.config import BoundarySettings, CompressorSettings, FeedbackMode, PipelineSettings
from ..core.errors import FileError
from ..core.option import Device, Level
from ..core.profile import ClusterProfile, CodecProfile, PipelineTrace
from .cost import Costs
from .pipeline_timeline import Boundary, Message, Played, StageTimes, blocking, overlapped

HEADER_BYTES = 128
"""What a message of the runtime has in front of its payload."""
USUAL = (
    CompressorSettings(name="quantize", bits=8, feedback="none"),
    CompressorSettings(name="quantize", bits=4, feedback="none"),
    CompressorSettings(name="topk_sampled", density=0.1, feedback="none"),
)
"""Codecs to profile for boundaries where the user names none: TopK 1%, the default for gradients, is too strong here."""
_BY_MAGNITUDE = ("topk", "topk_sampled")
Direction = Literal["forward", "backward"]


class Candidate(NamedTuple):
    """A codec for a direction of a boundary: its number in the profile, None for as it is, and what it loses."""

    codec: int | None
    settings: CompressorSettings | None
    relative_error: float


Pair = tuple[Candidate, Candidate]
"""Of a boundary: forward and backward."""
AS_IT_IS = Candidate(None, None, 0.0)


@dataclass(frozen=True)
class Pipeline:
    """A traced pipeline on profiled links with profiled codecs.

    Raises:
        FileError: links between its stages were not measured, or its boundaries sent nothing.
    """

    trace: PipelineTrace
    cluster: ClusterProfile
    costs: Costs
    per_example: bool = False

    @property
    def stages(self) -> list[StageTimes]:
        """Seconds of the stages."""
        return [StageTimes(stage.forward_s, stage.backward_s, stage.after_s) for stage in self.trace.stages]

    def played(self, pairs: Sequence[Pair], synchronised_s: Sequence[float] = (), free: bool = False) -> Played:
        """A step with these codecs; `free`: if they took no time."""
        boundaries = self.boundaries(pairs)
        if free:
            boundaries = [
                each._replace(forward=Message(each.forward.nbytes), backward=Message(each.backward.nbytes)) for each in boundaries
            ]
        delays = {} if free else {"contention": self.costs.contention, "handling_s": self.costs.handling_s}
        return overlapped(self.stages, boundaries, self.trace.micro_batches, synchronised_s=synchronised_s, **delays)

    def stock_s(self, synchronised_s: Sequence[float] = ()) -> float:
        """A step of DeepSpeed as it is."""
        plain = [each._replace(after_s=each.after_s + wait) for each, wait in zip(self.stages, synchronised_s, strict=False)]
        boundaries = self.boundaries([(AS_IT_IS, AS_IT_IS)] * len(self.trace.boundaries), header_bytes=0)
        return blocking(plain or self.stages, boundaries, self.trace.micro_batches).step_s

    def compute_s(self) -> float:
        """A step if messages took no time."""
        free = [Boundary(Message(0), Message(0), 0.0, 0.0)] * len(self.trace.boundaries)
        return overlapped(self.stages, free, self.trace.micro_batches).step_s

    def boundaries(self, pairs: Sequence[Pair], header_bytes: int = HEADER_BYTES) -> list[Boundary]:
        """Messages and links with these codecs."""
        return [
            Boundary(
                self._message(boundary, "forward", pair[0], header_bytes),
                self._message(boundary, "backward", pair[1], header_bytes),
                *self._link(boundary),
            )
            for boundary, pair in enumerate(pairs)
        ]

    def sent_bytes(self, pairs: Sequence[Pair]) -> int:
        """Bytes that the busiest stage sends in a step."""
        sent = [0.0] * len(self.trace.stages)
        for number, boundary in enumerate(self.boundaries(pairs)):
            sent[number] += boundary.forward.nbytes * self.trace.micro_batches
            sent[number + 1] += boundary.backward.nbytes * self.trace.micro_batches
        return round(max(sent))

    def _message(self, boundary: int, direction: Direction, candidate: Candidate, header_bytes: int) -> Message:
        traced = self.trace.boundaries[boundary]
        tensors = traced.forward_numel if direction == "forward" else traced.backward_numel
        if candidate.codec is None:
            return Message(sum(tensors) * traced.element_bytes + header_bytes * len(tensors))
        codec, payloads = candidate.codec, traced.examples if self.per_example else 1
        each = [-(-numel // payloads) for numel in tensors]
        return Message(
            payloads * sum(float(self.costs.payload_nbytes(Device.CPU, n, codec)) for n in each) + header_bytes * len(each),
            payloads * sum(self.costs.codec_s("encode", codec, Device.CPU, n) for n in each),
            payloads * sum(self.costs.codec_s("decode", codec, Device.CPU, n) for n in each),
        )

    def _link(self, boundary: int) -> tuple[float, float]:
        one, other = self.trace.stages[boundary].host, self.trace.stages[boundary + 1].host
        level = Level.INTRA if one == other else Level.INTER
        link = self.cluster.links.get(level)
        if link is None:
            raise FileError(
                f"cluster profile: the {level} link between stages {boundary} and {boundary + 1} was not measured; "
                f"measure it on the hosts of the training with `{ClusterProfile.MADE_BY}`"
            )
        return link.alpha_s, link.beta_s_per_byte


def candidates(codecs: Sequence[CodecProfile], least_density: float, feedback: FeedbackMode = "none") -> list[Candidate]:
    """As it is, and every codec that keeps the scale of what it encodes and, of TopK, enough of it; each with this feedback."""
    found = [AS_IT_IS]
    for number, codec in enumerate(codecs):
        settings = codec.compressor
        dense = settings.density is None
        if codec.votes or not codec.keeps_scale or not any(times.device is Device.CPU for times in codec.devices):
            continue
        if dense or (settings.name in _BY_MAGNITUDE and (settings.density or 0) >= least_density):
            kept = CompressorSettings(**{**settings.model_dump(), "feedback": feedback})
            found.append(Candidate(number, kept, codec.relative_error))
    return found


def pairs_of(forward: Sequence[Candidate], backward: Sequence[Candidate], milder_backward: bool) -> list[Pair]:
    """What a boundary may have: any two or, if `milder_backward`, those whose gradients lose less than activations or nothing."""
    return [
        (one, other)
        for one in forward
        for other in backward
        if not milder_backward or other.relative_error == 0 or other.relative_error < one.relative_error
    ]


def best(pipeline: Pipeline, every: Sequence[Pair], worthwhile: float, thrift: float) -> list[Pair]:
    """The pairs of all boundaries.

    Args:
        pipeline: with its costs.
        every: what a boundary may have.
        worthwhile: least share of the uncompressed step that compression must save.
        thrift: share of the shortest step to give for losing less.
    """
    count = len(pipeline.trace.boundaries)
    plain = [(AS_IT_IS, AS_IT_IS)] * count

    def seconds(pairs: Sequence[Pair]) -> float:
        return pipeline.played(pairs).step_s

    def price(pairs: Sequence[Pair]) -> tuple[float, float]:
        return seconds(pairs), _loss(pairs)

    pairs = min([[pair] * count for pair in every], key=price)
    while True:
        shorter = min(_changed(pairs, every), key=price, default=pairs)
        if seconds(shorter) >= seconds(pairs):
            break
        pairs = shorter
    limit = seconds(plain) * (1 - worthwhile)
    if seconds(pairs) > limit:
        return plain
    limit = min(limit, seconds(pairs) * (1 + thrift))
    while milder := [each for each in _changed(pairs, every) if _loss(each) < _loss(pairs) and seconds(each) <= limit]:
        pairs = min(milder, key=lambda pairs: (_loss(pairs), seconds(pairs)))
    return pairs


def settings_of(pairs: Sequence[Pair], given: PipelineSettings) -> PipelineSettings:
    """Settings with these pairs, which have their feedback; all else as given."""
    own = {boundary: BoundarySettings(forward=pair[0].settings, backward=pair[1].settings) for boundary, pair in enumerate(pairs)}
    alike = len(set(pairs)) == 1
    shared = own[0] if alike else BoundarySettings()
    update = {"forward": shared.forward, "backward": shared.backward, "boundaries": {} if alike else own, "feedback": "none"}
    return given.model_copy(update=update)


def reasons(pipeline: Pipeline, pairs: Sequence[Pair]) -> list[str]:
    """Why each boundary is as it is, for people."""
    step_s = pipeline.played(pairs).step_s
    before = pipeline.boundaries([(AS_IT_IS, AS_IT_IS)] * len(pairs))
    found = []
    for number, (pair, boundary) in enumerate(zip(pairs, pipeline.boundaries(pairs), strict=True)):
        names = " and ".join("as it is" if each.settings is None else each.settings.label.partition(",")[0] for each in pair)
        plain = [*pairs[:number], (AS_IT_IS, AS_IT_IS), *pairs[number + 1 :]]
        saved = pipeline.played(plain).step_s - step_s
        was, now = (sum(m.nbytes for m in each[:2]) for each in (before[number], boundary))
        found.append(
            f"{names}: {now / 1e6:.3f} MB a micro-batch, not {was / 1e6:.3f}; as it is, a step would take {saved:.4f} s more"
        )
    return found


def _changed(pairs: Sequence[Pair], every: Sequence[Pair]) -> Iterator[list[Pair]]:
    """All that differ in one boundary."""
    for place, now in enumerate(pairs):
        for pair in every:
            if pair != now:
                yield [*pairs[:place], pair, *pairs[place + 1 :]]


def _loss(pairs: Sequence[Pair]) -> float:
    return sum(forward.relative_error + backward.relative_error for forward, backward in pairs)

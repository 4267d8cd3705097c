"""What a message over a pipeline boundary says: how a tensor becomes bytes on one side, and what the other side makes of them.

    header | numbers of examples, where known | payloads

Payloads are, as the way tells: the tensor as it is; what a codec makes of it, whole or each example by itself; its values where
TopK has chosen those of the activations (shared indices, Rudakov et al. 2023); or, with AQ-SGD, new examples as they are and
known ones as changes. Outside training nothing is remembered, and codecs see the tensors themselves.
"""

from __future__ import annotations

import queue
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..compressors.base import Codec, padded
from ..compressors.spanwise import poison
from ..compressors.topk import TopK
from ..core.errors import SyncError, UnsupportedError
from ..feedback import Feedback
from ..feedback.examples import ExampleMemory

_WORDS = 16
HEADER = 8 * _WORDS
"""Bytes of a message's header."""
_END = -1
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NUMBER = 8


class Message(NamedTuple):
    """A header: which message it is, of which tensor of its micro-batch, and how its bytes are to be read."""

    number: int
    tensor: int
    nbytes: int
    training: bool
    examples: int
    payloads: int
    dtype: torch.dtype
    shape: torch.Size

    def write(self, header: Tensor) -> None:
        """Fill a header: uint8, shape (HEADER,)."""
        fixed = [*self[:3], int(self.training), *self[4:6], _DTYPES.index(self.dtype)]
        words = [*fixed, len(self.shape), *self.shape]
        header.view(torch.int64)[: len(words)] = torch.tensor(words)

    @staticmethod
    def write_end(header: Tensor) -> None:
        """Fill a header that says that no message follows."""
        header.view(torch.int64)[0] = _END

    @classmethod
    def read(cls, header: Tensor) -> Message | None:
        """Inverse of `write`; None at the end."""
        number, tensor, nbytes, training, examples, payloads, dtype, dims, *shape = header.view(torch.int64).tolist()
        if number == _END:
            return None
        return cls(number, tensor, nbytes, bool(training), examples, payloads, _DTYPES[dtype], torch.Size(shape[:dims]))


class Chosen:
    """Places that TopK chose of activations, until their gradients cross: by tensor, in the order of micro-batches."""

    def __init__(self) -> None:
        self._rows: defaultdict[int, queue.SimpleQueue[list[Tensor]]] = defaultdict(queue.SimpleQueue)

    def put(self, index: int, rows: list[Tensor]) -> None:
        """Those of the next micro-batch: int64, one tensor for each payload."""
        self._rows[index].put(rows)

    def take(self, index: int) -> list[Tensor]:
        """Those of the micro-batch whose gradients come next. Raises SyncError where there are none."""
        try:
            return self._rows[index].get_nowait()
        except queue.Empty:
            raise SyncError(f"gradients of tensor {index} come before its activations; the stages are not in step") from None


@dataclass(frozen=True)
class Way:
    """How the tensors of one direction travel.

    Attributes:
        label: for people and errors, such as `boundary 0 forward`.
        codec: None sends tensors as they are.
        feedback: what both sides remember while training.
        per_example: whether each example (index of the first dimension) is a payload of its own.
        seed: of random codecs.
        chosen: with a codec, where its choice is left; without one, gradients are sent where it was left.
        examples: memory of AQ-SGD.
    """

    label: str
    codec: Codec | None
    feedback: Feedback = field(default_factory=lambda: Feedback("none"))
    per_example: bool = False
    seed: int = 0
    chosen: Chosen | None = None
    examples: ExampleMemory | None = None

    @property
    def kind(self) -> str:
        """Codec and feedback for people."""
        if self.codec is None:
            return "as it is" if self.chosen is None else "where activations were chosen"
        memory = "aqsgd" if self.examples is not None else self.feedback.mode
        return self.codec.name if memory == "none" else f"{self.codec.name}, {memory}"

    def state_dict(self) -> dict[str, object]:
        """What this side remembers."""
        state: dict[str, object] = {"kind": self.kind, "feedback": self.feedback.state_dict()}
        return state | ({} if self.examples is None else {"examples": self.examples.state_dict()})

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on from what `state_dict` returned. Raises MismatchError where that was made with another memory."""
        feedback, examples = state["feedback"], state.get("examples")
        assert isinstance(feedback, Mapping)
        self.feedback.load_state_dict(feedback)
        if self.examples is not None and isinstance(examples, Mapping):
            self.examples.load_state_dict(examples)

    def forget(self) -> None:
        """Remember nothing."""
        self.feedback.clear()
        if self.examples is not None:
            self.examples.clear()


class Sender:
    """Makes messages of a way's tensors, one after the other."""

    def __init__(self, way: Way) -> None:
        self.way, self.sent = way, 0
        self._places: list[Tensor] = []
        self._known: list[bool] = []

    def message(self, x: Tensor, index: int, training: bool, examples: Tensor | None) -> Message:
        """The header of the next message. Its tensor is to be written before another header is made.

        Args:
            x: floating point, any shape.
            index: of the tensor in its micro-batch.
            training: whether what is remembered takes part.
            examples: numbers of the examples, int64, shape (len(x),), where they are known.

        Raises:
            SyncError: AQ-SGD has no numbers, or shared indices no activations.
        """
        way, payloads = self.way, 1
        if way.examples is not None and training:
            numbers = _numbers(way, x, examples)
            self._known = way.examples.known(index, numbers)
            payloads, numel = sum(self._known), x.numel() // max(1, len(x))
            nbytes = padded((len(x) - payloads) * numel * x.element_size()) + _changes_nbytes(way, x.shape, payloads)
        elif way.codec is not None:
            payloads, numel = _rows(way, x.shape)
            nbytes = payloads * padded(way.codec.for_shape(_row_shape(way, x.shape)).payload_nbytes(numel))
        elif way.chosen is not None and training:
            self._places = way.chosen.take(index)
            nbytes = 2 * sum(map(len, self._places))
        else:
            nbytes = x.numel() * x.element_size()
        count = 0 if examples is None else len(examples)
        return Message(self.sent, index, padded(_NUMBER * count) + nbytes, training, count, payloads, x.dtype, x.shape)

    def write(self, x: Tensor, payload: Tensor, message: Message, examples: Tensor | None) -> None:
        """Fill the message's bytes (uint8, shape (message.nbytes,))."""
        way, head = self.way, padded(_NUMBER * message.examples)
        if examples is not None:
            payload[: _NUMBER * message.examples].view(torch.int64).copy_(examples)
        body = payload[head:]
        if way.examples is not None and message.training:
            assert examples is not None
            self._write_examples(way.examples, x, body, message, examples.tolist())
        elif way.codec is not None:
            self._write_payloads(way.codec, x, body, message)
        elif way.chosen is not None and message.training:
            self._write_chosen(x, body.view(torch.bfloat16))
        else:
            body.copy_(x.contiguous().view(-1).view(torch.uint8))
        self.sent += 1

    def _write_payloads(self, codec: Codec, x: Tensor, body: Tensor, message: Message) -> None:
        way, places = self.way, []
        count, numel = message.payloads, x.numel() // max(1, message.payloads)
        codec = codec.for_shape(_row_shape(way, x.shape))
        flat = x.reshape(count, numel).float()
        for place, row in enumerate(body.view(count, len(body) // count)):
            payload = row[: codec.payload_nbytes(numel)]
            if message.training:
                way.feedback.encode(codec, flat[place], payload, way.seed + self.sent, f"{message.tensor}/{place}")
            else:
                codec.encode(flat[place], payload, way.seed + self.sent)
            if way.chosen is not None and message.training:
                places.append(_indices(codec, payload, numel))
        if places:
            assert way.chosen is not None
            way.chosen.put(message.tensor, places)

    def _write_chosen(self, x: Tensor, values: Tensor) -> None:
        rows = x.reshape(len(self._places), -1)
        start = 0
        for row, places in zip(rows, self._places, strict=True):
            values[start : start + len(places)] = row[places]
            start += len(places)
        values.add_(poison(x))  # NaN and Inf elsewhere are not hidden

    def _write_examples(self, memory: ExampleMemory, x: Tensor, body: Tensor, message: Message, numbers: list[int]) -> None:
        rows, known = x.reshape(len(x), -1), torch.tensor(self._known, dtype=torch.bool)
        fresh = rows[~known].contiguous()
        body[: fresh.nbytes].copy_(fresh.view(-1).view(torch.uint8))
        old = [number for number, held in zip(numbers, self._known, strict=True) if held]
        if old:
            held = memory.recall(message.tensor, old)
            change = rows[known].float() - held
            changes = body[padded(fresh.nbytes) :]
            for part, row, codec in _changes(self.way, change, changes, message.shape):
                codec.encode(part, row, self.way.seed + self.sent)
            memory.keep(message.tensor, old, _added(self.way, held, changes, message, self.way.seed + self.sent))
        if new := [number for number, held in zip(numbers, self._known, strict=True) if not held]:
            memory.keep(message.tensor, new, fresh.float())


class Receiver:
    """Reads a way's messages, one after the other."""

    def __init__(self, way: Way) -> None:
        self.way = way

    def read(self, payload: Tensor, message: Message) -> tuple[Tensor, Tensor | None]:
        """The tensor of a message, of its shape, and the numbers of its examples where they came along.

        Raises:
            SyncError: this side remembers something else than the sender.
        """
        way, head = self.way, padded(_NUMBER * message.examples)
        examples = payload[: _NUMBER * message.examples].view(torch.int64).clone() if message.examples else None
        body = payload[head:]
        if way.examples is not None and message.training:
            assert examples is not None
            return self._read_examples(way.examples, body, message, examples.tolist()), examples
        if way.codec is not None:
            return self._read_payloads(way.codec, body, message), examples
        if way.chosen is not None and message.training:
            return _read_chosen(way.chosen, body.view(torch.bfloat16), message), examples
        return body.clone().view(message.dtype).view(message.shape), examples

    def _read_payloads(self, codec: Codec, body: Tensor, message: Message) -> Tensor:
        way, places, count = self.way, [], message.payloads
        out = torch.empty(count, message.shape.numel() // max(1, count))
        codec = codec.for_shape(_row_shape(way, message.shape))
        for place, row in enumerate(body.view(count, len(body) // count)):
            codec.decode_sum(row[None], out[place], way.seed + message.number)
            if message.training:
                way.feedback.decoded(out[place], f"{message.tensor}/{place} decoded")
            if way.chosen is not None and message.training:
                places.append(_indices(codec, row[: codec.payload_nbytes(out.shape[1])], out.shape[1]))
        if places:
            assert way.chosen is not None
            way.chosen.put(message.tensor, places)
        return out.view(message.shape)

    def _read_examples(self, memory: ExampleMemory, body: Tensor, message: Message, numbers: list[int]) -> Tensor:
        known = memory.known(message.tensor, numbers)
        if sum(known) != message.payloads:
            raise SyncError(
                f"this stage holds {sum(known)} of the {len(known)} examples of message {message.number}, the sender "
                f"{message.payloads}; load checkpoints on all stages or on none"
            )
        mask, out = torch.tensor(known, dtype=torch.bool), torch.empty(len(known), message.shape.numel() // max(1, len(known)))
        fresh_nbytes = int((~mask).sum()) * out.shape[1] * message.dtype.itemsize
        fresh = body[:fresh_nbytes].clone().view(message.dtype).view(-1, out.shape[1])
        if old := [number for number, held in zip(numbers, known, strict=True) if held]:
            seed = self.way.seed + message.number
            total = _added(self.way, memory.recall(message.tensor, old), body[padded(fresh_nbytes) :], message, seed)
            memory.keep(message.tensor, old, total)
            out[mask] = total
        if new := [number for number, held in zip(numbers, known, strict=True) if not held]:
            memory.keep(message.tensor, new, fresh.float())
            out[~mask] = fresh.float()
        return out.view(message.shape)


def _read_chosen(chosen: Chosen, values: Tensor, message: Message) -> Tensor:
    rows = chosen.take(message.tensor)
    if len(values) != sum(map(len, rows)):
        raise SyncError(f"{len(values)} values of gradients came where {sum(map(len, rows))} activations were chosen")
    out = torch.zeros(len(rows), message.shape.numel() // len(rows))
    start = 0
    for row, places in zip(out, rows, strict=True):
        row[places] = values[start : start + len(places)].float()
        start += len(places)
    return out.view(message.shape)


def _numbers(way: Way, x: Tensor, examples: Tensor | None) -> list[int]:
    if examples is None or x.dim() == 0 or len(examples) != len(x):
        found = "no numbers" if examples is None else f"{len(examples)} numbers"
        raise SyncError(
            f"AQ-SGD has {found} of examples for a tensor of shape {list(x.shape)}, whose first dimension should be the examples'"
        )
    return examples.tolist()


def _rows(way: Way, shape: torch.Size) -> tuple[int, int]:
    """Number of payloads of a tensor, and elements of each."""
    count = shape[0] if way.per_example and len(shape) > 1 and shape.numel() else 1
    return count, shape.numel() // count


def _row_shape(way: Way, shape: torch.Size) -> torch.Size:
    """What a payload is of: an example by itself is a batch of one."""
    return torch.Size([1, *shape[1:]]) if _rows(way, shape)[0] > 1 else shape


def _changes_nbytes(way: Way, shape: torch.Size, known: int) -> int:
    if not known:
        return 0
    assert way.codec is not None
    numel = shape.numel() // shape[0]
    if way.per_example:
        return known * padded(way.codec.for_shape(torch.Size([1, *shape[1:]])).payload_nbytes(numel))
    return padded(way.codec.for_shape(torch.Size([known, *shape[1:]])).payload_nbytes(known * numel))


def _changes(way: Way, change: Tensor, body: Tensor, shape: torch.Size) -> list[tuple[Tensor, Tensor, Codec]]:
    """Elements, payload and codec of each part of the changes (float32, shape (known, numel))."""
    assert way.codec is not None
    count = len(change) if way.per_example else 1
    codec = way.codec.for_shape(torch.Size([len(change) // count, *shape[1:]]))
    flat = change.view(count, -1)
    rows = body.view(count, len(body) // count)
    return [(part, row[: codec.payload_nbytes(flat.shape[1])], codec) for part, row in zip(flat, rows, strict=True)]


def _added(way: Way, held: Tensor, body: Tensor, message: Message, seed: int) -> Tensor:
    """What both sides hold with the changes."""
    for part, row, codec in _changes(way, held, body, message.shape):
        codec.decode_add(row, part, seed)
    return held


def _indices(codec: Codec, payload: Tensor, numel: int) -> Tensor:
    if not isinstance(codec, TopK):
        raise UnsupportedError(f'"shared_indices" with {codec.name}, which does not choose by magnitude; choose topk')
    return codec.indices(payload, numel)

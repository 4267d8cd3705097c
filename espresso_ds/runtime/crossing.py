"""What crosses a pipeline boundary in one direction: encoded, sent, received and decoded beside the computing of both stages.

    stage b        send(x) -> queue -> thread: encode, send
    stage b + 1                                thread: receive, decode -> queue -> receive(out)

A message is a header and its bytes: micro-batches may have any shapes, and a stage that is out of step is found out rather than
waited for. Each direction has a process group of its own, on which one thread sends and one receives, so that messages keep the
order in which the schedule made them. At most `AHEAD` wait on each side; a schedule that runs with sends that wait for their
receiver runs with these as well, since a longer queue never keeps a stage from going on.

On a CPU; on CUDA the payloads would cross on streams of these threads, which is not there yet.
"""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass, field
from datetime import timedelta

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from ..compressors.base import Codec, padded
from ..core.errors import SyncError
from ..feedback import Feedback

AHEAD = 4
"""Messages that may wait on each side."""
_CLOSE_S = 5.0
_IDLE = timedelta(days=365)
"""Between two steps there may be any time; whoever waits for a message has a deadline of its own."""
_WORDS = 6
_END = -1


@dataclass(frozen=True)
class Way:
    """How the tensors of one direction travel.

    Attributes:
        label: for people and errors, such as `boundary 0 forward`.
        codec: None sends tensors as they are.
        feedback: what both sides remember while training.
        per_example: whether each example (index of the first dimension) is a payload of its own.
        seed: of random codecs.
    """

    label: str
    codec: Codec | None
    feedback: Feedback = field(default_factory=lambda: Feedback("none"))
    per_example: bool = False
    seed: int = 0

    @property
    def kind(self) -> str:
        """Codec and feedback for people."""
        if self.codec is None:
            return "as it is"
        return self.codec.name if self.feedback.mode == "none" else f"{self.codec.name}, {self.feedback.mode}"

    def rows(self, x: Tensor) -> tuple[int, int]:
        """Number of payloads of a tensor, and elements of each."""
        count = len(x) if self.per_example and x.dim() > 1 and x.numel() else 1
        return count, x.numel() // count

    def nbytes(self, x: Tensor) -> int:
        """Bytes of a tensor on the wire, without the header."""
        if self.codec is None:
            return x.numel() * x.element_size()
        count, numel = self.rows(x)
        return count * padded(self.codec.payload_nbytes(numel))


class Outgoing:
    """The sending side of a direction: `send` returns at once, a thread encodes and sends. One thread calls.

    Args:
        way: how tensors travel.
        group: of the two ranks, used by nobody else.
        timeout_s: deadline of every wait.
    """

    def __init__(self, way: Way, group: ProcessGroup, timeout_s: float) -> None:
        self._way, self._group, self._timeout_s = way, group, timeout_s
        self._peer = 1 - group.rank()
        self._queue: queue.Queue[tuple[Tensor, int, bool] | None] = queue.Queue(AHEAD)
        self._fault: BaseException | None = None
        self._sent = 0
        self._thread = threading.Thread(target=self._work, name=f"espresso {way.label} out", daemon=True)
        self._thread.start()

    def send(self, x: Tensor, index: int, training: bool) -> None:
        """Send a tensor, which nobody may change before the other side has it.

        Args:
            x: floating point, any shape.
            index: of the tensor among those of its micro-batch: what is remembered is remembered by it.
            training: whether feedback takes part.

        Raises:
            SyncError: an earlier message failed, or the receiver has not taken one for the deadline.
        """
        try:
            self._queue.put((x.detach(), index, training), timeout=self._timeout_s if self._fault is None else 0.0)
        except queue.Full:
            self._raise("no room for a message")
        if self._fault is not None:
            self._raise("a message failed")

    def close(self) -> None:
        """Tell the other side that nothing follows, and end the thread once all is sent."""
        if self._thread.is_alive():
            try:
                self._queue.put(None, timeout=_CLOSE_S)
            except queue.Full:
                return
            self._thread.join(_CLOSE_S)

    def _raise(self, what: str) -> None:
        cause = self._fault or f"the other stage has taken none for {self._timeout_s:g} s"
        raise SyncError(f"{self._way.label}: {what}: {cause}") from self._fault

    def _work(self) -> None:
        under_way: list[list[Work]] = [[], []]
        places = [(torch.empty(_WORDS, dtype=torch.int64), torch.empty(0, dtype=torch.uint8)) for _ in under_way]
        try:
            while (item := self._queue.get()) is not None:
                place = self._sent % 2  # one is encoded while the other is on its way
                self._settle(under_way[place])
                header, payload = places[place]
                nbytes = self._way.nbytes(item[0])
                if payload.numel() < nbytes:
                    payload = torch.empty(nbytes, dtype=torch.uint8)
                    places[place] = header, payload
                under_way[place] = self._start(*item, header, payload[:nbytes])
            header = torch.full((_WORDS,), _END)
            for works in (*under_way, [self._group.send([header], self._peer, 0)]):
                self._settle(works)
        except BaseException as error:
            self._fault = error

    def _start(self, x: Tensor, index: int, training: bool, header: Tensor, payload: Tensor) -> list[Work]:
        way = self._way
        if way.codec is None:
            payload.copy_(x.contiguous().view(-1).view(torch.uint8))
        else:
            count, numel = way.rows(x)
            flat = x.reshape(count, numel).float()
            for number, row in enumerate(payload.view(count, len(payload) // count)):
                self._encode(way.codec, flat[number], row[: way.codec.payload_nbytes(numel)], f"{index}/{number}", training)
        header.copy_(torch.tensor([self._sent, index, x.numel(), way.rows(x)[0], payload.numel(), int(training)]))
        self._sent += 1
        works = [self._group.send([header], self._peer, 0)]
        return [*works, self._group.send([payload], self._peer, 0)] if payload.numel() else works

    def _encode(self, codec: Codec, x: Tensor, payload: Tensor, site: str, training: bool) -> None:
        seed = self._way.seed + self._sent
        if training:
            self._way.feedback.encode(codec, x, payload, seed, site)
        else:
            codec.encode(x, payload, seed)

    def _settle(self, works: list[Work]) -> None:
        while works:
            works.pop(0).wait(_IDLE)  # the next stage may compute for any time before it takes more


class Incoming:
    """The receiving side of a direction: a thread receives and decodes ahead, `receive` hands over. One thread calls.

    Args:
        way: as the sender has it.
        group: of the two ranks, used by nobody else.
        timeout_s: deadline of `receive`.
    """

    def __init__(self, way: Way, group: ProcessGroup, timeout_s: float) -> None:
        self._way, self._group, self._timeout_s = way, group, timeout_s
        self._peer = 1 - group.rank()
        self._queue: queue.Queue[tuple[Tensor, list[int]] | BaseException] = queue.Queue(AHEAD)
        self._received = 0
        self._thread = threading.Thread(target=self._work, name=f"espresso {way.label} in", daemon=True)
        self._thread.start()

    def receive(self, out: Tensor, index: int) -> None:
        """Wait for the next tensor and copy it to `out`.

        Args:
            out: floating point, of the shape that was sent.
            index: of the tensor among those of its micro-batch.

        Raises:
            SyncError: none came before the deadline, it is another one than expected, or the other stage has ended.
        """
        try:
            found = self._queue.get(timeout=self._timeout_s)
        except queue.Empty:
            raise SyncError(
                f"{self._way.label}: nothing came for {self._timeout_s:g} s; the stage before is slow, stuck or gone "
                '(a longer deadline: "timeout_s" in the espresso block)'
            ) from None
        if isinstance(found, BaseException):
            self._queue.put(found)
            raise SyncError(f"{self._way.label}: {found}") from found
        values, (number, sent_index, numel, *_) = found
        if (number, sent_index, numel) != (self._received, index, out.numel()):
            raise SyncError(
                f"{self._way.label}: expected message {self._received} with tensor {index} of {out.numel()} elements, "
                f"got message {number} with tensor {sent_index} of {numel}; the stages are not in step"
            )
        self._received += 1
        source = values if self._way.codec is not None else values.view(out.dtype)
        out.copy_(source.view(out.shape))

    def close(self) -> None:
        """Wait a little for the end of the other side's messages."""
        self._thread.join(_CLOSE_S)

    def _work(self) -> None:
        header, room = torch.empty(_WORDS, dtype=torch.int64), torch.empty(0, dtype=torch.uint8)
        try:
            while True:
                self._group.recv([header], self._peer, 0).wait(_IDLE)
                words = header.tolist()
                if words[0] == _END:
                    raise SyncError("the other stage has ended")
                nbytes = words[4]
                if room.numel() < nbytes:
                    room = torch.empty(nbytes, dtype=torch.uint8)
                payload = room[:nbytes]
                if nbytes:
                    self._group.recv([payload], self._peer, 0).wait(_IDLE)
                self._queue.put((self._decoded(payload, *words), words))
        except BaseException as error:  # belongs to the thread that waits
            self._queue.put(error)

    def _decoded(self, payload: Tensor, number: int, index: int, numel: int, count: int, nbytes: int, training: int) -> Tensor:
        codec = self._way.codec
        if codec is None:
            return payload.clone()
        out = torch.empty(count, numel // count)
        for place, row in enumerate(payload.view(count, nbytes // count)):
            codec.decode_sum(row[None], out[place], self._way.seed + number)
            if training:
                self._way.feedback.decoded(out[place], f"{index}/{place} decoded")
        return out

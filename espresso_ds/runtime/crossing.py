"""What crosses a pipeline boundary in one direction: encoded, sent, received and decoded beside the computing of both stages.

    stage b        send(x) -> queue -> thread: encode, send
    stage b + 1                                thread: receive, decode -> queue -> receive(out)

A message is a header and its bytes: micro-batches may have any shapes, and a stage that is out of step is found out rather than
waited for. Both travel as one where the receiver can know their size in advance (`Frames`). Each direction has a process group
of its own, on which one thread sends and one receives, so that messages keep the order in which the schedule made them. At most
`AHEAD` wait on each side; a schedule that runs with sends that wait for their receiver runs with these as well, since a longer
queue never keeps a stage from going on.

On a CPU; on CUDA the payloads would cross on streams of these threads, which is not there yet.
"""

from __future__ import annotations

import queue
import threading
import warnings
from datetime import timedelta

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from ..core.errors import SyncError
from .parcel import HEADER, Message, Receiver, Sender, Way

AHEAD = 4
"""Messages that may wait on each side."""
_CLOSE_S, _STUCK_S = 5.0, 20.0
"""How long the end of a channel waits: for what the other side still says, and for it to take one message."""
_IDLE = timedelta(days=365)
"""Between two steps there may be any time; whoever waits for a message has a deadline of its own."""


class Frames:
    """How many bytes the receiver makes room for behind the next header: both sides work it out from the messages before.

    As many as the last message of that tensor had, if the one before had as many; else none, and the bytes come apart: a second
    message, for which the receiver has to ask.
    """

    def __init__(self) -> None:
        self._sizes: dict[int, tuple[int, int]] = {}
        self._next = 0

    def room(self) -> int:
        """Bytes behind the next header."""
        last, before = self._sizes.get(self._next, (0, -1))
        return last if last == before else 0

    def add(self, message: Message) -> None:
        """A message has been framed."""
        last, _ = self._sizes.get(message.tensor, (0, -1))
        self._sizes[message.tensor] = message.nbytes, last
        self._next = message.tensor + 1 if message.tensor + 1 in self._sizes else 0


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
        self.sender = Sender(way)
        self._queue: queue.Queue[tuple[Tensor, int, bool, Tensor | None] | None] = queue.Queue(AHEAD)
        self._fault: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name=f"espresso {way.label} out", daemon=True)
        self._thread.start()

    def send(self, x: Tensor, index: int, training: bool, examples: Tensor | None = None) -> None:
        """Send a tensor, which nobody may change before the other side has it.

        Args:
            x: floating point, any shape.
            index: of the tensor among those of its micro-batch: what is remembered is remembered by it.
            training: whether feedback takes part.
            examples: numbers of the examples of the first dimension, int64, where they are known.

        Raises:
            SyncError: an earlier message failed, or the receiver has not taken one for the deadline.
        """
        try:
            self._queue.put((x.detach(), index, training, examples), timeout=self._timeout_s if self._fault is None else 0.0)
        except queue.Full:
            self._raise("no room for a message")
        if self._fault is not None:
            self._raise("a message failed")

    def close(self) -> None:
        """Tell the other side that nothing follows, and end the thread once all is sent; warn where it takes no more."""
        ended = False
        while self._thread.is_alive():
            sent = self.sender.sent
            try:
                if not ended:
                    self._queue.put(None, timeout=_STUCK_S)
                    ended = True
                self._thread.join(_STUCK_S)
            except queue.Full:
                pass
            if self._thread.is_alive() and self.sender.sent == sent:
                warnings.warn(f"{self._way.label}: the other stage takes no more; the last messages are lost", stacklevel=2)
                return

    def _raise(self, what: str) -> None:
        cause = self._fault or f"the other stage has taken none for {self._timeout_s:g} s"
        raise SyncError(f"{self._way.label}: {what}: {cause}") from self._fault

    def _work(self) -> None:
        under_way: list[list[Work]] = [[], []]
        buffers, frames = [torch.empty(HEADER, dtype=torch.uint8) for _ in under_way], Frames()
        try:
            while (item := self._queue.get()) is not None:
                place = self.sender.sent % 2  # one is encoded while the other is on its way
                self._settle(under_way[place])
                x, *_, examples = item
                message, room = self.sender.message(*item), frames.room()
                buffers[place] = buffer = _large_enough(buffers[place], HEADER + max(room, message.nbytes))
                message.write(buffer[:HEADER])
                payload = buffer[HEADER : HEADER + message.nbytes]
                self.sender.write(x, payload, message, examples)
                parts = [buffer[: HEADER + room]] + ([payload] if message.nbytes not in (0, room) else [])
                under_way[place] = [self._group.send([part], self._peer, 0) for part in parts]
                frames.add(message)
            last = torch.zeros(HEADER + frames.room(), dtype=torch.uint8)
            Message.write_end(last[:HEADER])
            for works in (*under_way, [self._group.send([last], self._peer, 0)]):
                self._settle(works)
        except BaseException as error:
            self._fault = error

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
        self.received = 0
        self._receiver = Receiver(way)
        self._queue: queue.Queue[tuple[Tensor, Tensor | None, Message] | BaseException] = queue.Queue(AHEAD)
        self._thread = threading.Thread(target=self._work, name=f"espresso {way.label} in", daemon=True)
        self._thread.start()

    def receive(self, out: Tensor, index: int) -> Tensor | None:
        """Wait for the next tensor and copy it to `out`. Returns the numbers of its examples, where the sender knows them.

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
        values, examples, message = found
        if (message.number, message.tensor, message.shape) != (self.received, index, out.shape):
            raise SyncError(
                f"{self._way.label}: expected message {self.received} with tensor {index} of shape {list(out.shape)}, "
                f"got message {message.number} with tensor {message.tensor} of shape {list(message.shape)}; "
                "the stages are not in step"
            )
        self.received += 1
        out.copy_(values)
        return examples

    def close(self) -> None:
        """Wait a little for the end of the other side's messages."""
        self._thread.join(_CLOSE_S)

    def _work(self) -> None:
        frames, buffers = Frames(), [torch.empty(HEADER, dtype=torch.uint8) for _ in range(2)]
        try:
            room = frames.room()
            coming = self._group.recv([buffers[0]], self._peer, 0)
            while True:
                coming.wait(_IDLE)
                buffer = buffers[0]
                message = Message.read(buffer[:HEADER])
                if message is None:
                    raise SyncError("the other stage has ended")
                payload = buffer[HEADER : HEADER + message.nbytes]
                if message.nbytes not in (0, room):
                    payload = torch.empty(message.nbytes, dtype=torch.uint8)
                    self._group.recv([payload], self._peer, 0).wait(_IDLE)
                frames.add(message)
                room = frames.room()
                buffers = [_large_enough(buffers[1], HEADER + room), buffer]
                coming = self._group.recv([buffers[0][: HEADER + room]], self._peer, 0)  # beside decoding this one
                self._queue.put((*self._receiver.read(payload, message), message))
        except BaseException as error:  # belongs to the thread that waits
            self._queue.put(error)


def _large_enough(buffer: Tensor, nbytes: int) -> Tensor:
    return buffer if buffer.numel() >= nbytes else torch.empty(nbytes, dtype=torch.uint8)

"""The device seam: CUDA streams, events and pinned memory in a few functions that do nothing special on the CPU.

On CUDA a lane's work runs on its thread's own stream: it first waits for the event recorded when the gradient became ready,
and the training stream waits for all lanes in `join`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

import torch
from torch import Tensor

_lane_streams: dict[int, torch.cuda.Stream] = {}
_lock = threading.Lock()


def enter_lane(device: torch.device) -> None:
    """Give the calling lane thread a stream of its own."""
    if device.type != "cuda":
        return
    torch.cuda.set_device(device)
    stream = torch.cuda.Stream(device)
    torch.cuda.set_stream(stream)
    with _lock:
        _lane_streams[threading.get_ident()] = stream


def mark(device: torch.device) -> torch.cuda.Event | None:
    """A point on the current stream that a lane can wait for."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record()
    return event


def wait(event: object) -> None:
    """Let the current stream wait for a mark."""
    if isinstance(event, torch.cuda.Event):
        torch.cuda.current_stream().wait_event(event)


def used(tensors: Iterable[Tensor]) -> None:
    """Keep the memory of tensors, which their owner may let go of, until the current stream is done with them."""
    for tensor in tensors:
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))


def join(device: torch.device) -> None:
    """Let the current stream wait for all that the lanes have enqueued."""
    if device.type != "cuda":
        return
    with _lock:
        for stream in _lane_streams.values():
            torch.cuda.current_stream(device).wait_stream(stream)


def finish(device: torch.device) -> None:
    """Return when the device has done all it was given, so that the host's clock tells its time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Offload:
    """Copies between the tensors' device and the host, for codecs that run on the host.

    Attributes:
        needed: whether the host is another device than the tensors'; if not, nothing below is called.
    """

    def __init__(self, device: torch.device) -> None:
        self.needed = device.type != "cpu"
        self._pinned = device.type == "cuda"

    def host_buffer(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Memory of the host, shape (numel,), that the device copies to and from by itself."""
        return torch.empty(numel, dtype=dtype, pin_memory=self._pinned)

    def fetch(self, host: Tensor, source: Tensor) -> None:
        """Copy `source` to the host, and return once it is there, as is all that was enqueued before."""
        host.copy_(source, non_blocking=True)
        if self._pinned:
            arrived = torch.cuda.Event(blocking=True)  # the thread sleeps instead of polling
            arrived.record()
            arrived.synchronize()

    def put(self, target: Tensor, host: Tensor) -> None:
        """Enqueue the copy to the device. `host` may be written to again once a later `fetch` has returned."""
        target.copy_(host, non_blocking=True)

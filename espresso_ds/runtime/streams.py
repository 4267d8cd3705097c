"""The device seam: CUDA streams and events in a few functions that do nothing on the CPU.

On CUDA a lane's work runs on its thread's own stream: it first waits for the event recorded when the gradient became ready,
and the training stream waits for all lanes in `join`.
"""

from __future__ import annotations

import threading

import torch

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


def join(device: torch.device) -> None:
    """Let the current stream wait for all that the lanes have enqueued."""
    if device.type != "cuda":
        return
    with _lock:
        for stream in _lane_streams.values():
            torch.cuda.current_stream(device).wait_stream(stream)

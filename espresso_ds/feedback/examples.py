"""What both sides of a pipeline boundary hold of each training example, for AQ-SGD (Wang et al., NeurIPS 2022, algorithm 1).

An example's activations go out whole on its first visit. On later ones the sender encodes the change against what both sides hold
of it, and both add what is decoded: C(x - m); m += D(C(x - m)); the receiver goes on with m.

Both sides hold the same bits, since both round alike whatever they keep.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..compressors.base import Codec, padded
from ..compressors.cast import Bf16
from ..compressors.identity import Identity
from ..compressors.quantize import Quantize
from ..core.errors import MismatchError, SyncError

Storage = Literal["float32", "bfloat16", "8 bits"]
_CODECS: Mapping[Storage, Codec] = {"float32": Identity(), "bfloat16": Bf16(), "8 bits": Quantize(8)}
_FIRST = 64
"""Examples that there is room for at first; the room doubles whenever it is full, as far as it may."""


class _Rows:
    """Examples of one tensor of a micro-batch, by number."""

    def __init__(self, numel: int, row_nbytes: int) -> None:
        self.numel, self.places = numel, dict[int, int]()
        self.held = torch.zeros(0, row_nbytes, dtype=torch.uint8)


class ExampleMemory:
    """Activations by the example's number and the place of the tensor in its micro-batch. One thread uses it.

    Args:
        label: of the direction, for errors.
        storage: float32, or rounded to bfloat16 or to 8 bits in blocks of 4096, at a half or a quarter of the memory.
        most_bytes: the most memory it may hold; where it grows it holds its examples twice for a moment.
    """

    def __init__(self, label: str, storage: Storage = "float32", most_bytes: int = 4 << 30) -> None:
        self._label, self._storage, self._most = label, storage, most_bytes
        self._codec = _CODECS[storage]
        self._tensors: dict[int, _Rows] = {}

    def known(self, index: int, examples: Sequence[int]) -> list[bool]:
        """Which of the examples are held of tensor `index`."""
        rows = self._tensors.get(index)
        return [rows is not None and example in rows.places for example in examples]

    def recall(self, index: int, examples: Sequence[int]) -> Tensor:
        """What is held of known examples: float32, shape (examples, numel)."""
        rows = self._tensors[index]
        out = torch.empty(len(examples), rows.numel)
        for row, example in zip(out, examples, strict=True):
            self._codec.decode_sum(rows.held[rows.places[example]][None], row, 0)
        return out

    def keep(self, index: int, examples: Sequence[int], values: Tensor) -> None:
        """Hold `values` (float32, shape (examples, numel)) from now on.

        Raises:
            MismatchError: an example of another size was held.
            SyncError: there is no room left.
        """
        rows = self._tensors.get(index)
        if rows is None:
            row_nbytes = padded(self._codec.payload_nbytes(values.shape[1]))
            rows = self._tensors[index] = _Rows(values.shape[1], row_nbytes)
        elif rows.numel != values.shape[1]:
            raise MismatchError(
                f"{self._label}: AQ-SGD holds examples of {rows.numel} elements, one of {values.shape[1]} came; "
                'give all examples one length, or "forward" another feedback'
            )
        nbytes = self._codec.payload_nbytes(rows.numel)
        for example, value in zip(examples, values.contiguous(), strict=True):
            place = rows.places.setdefault(example, len(rows.places))
            if place == len(rows.held):
                self._grow(rows)
            self._codec.encode(value, rows.held[place][:nbytes], 0)

    @property
    def nbytes(self) -> int:
        """Memory held."""
        return sum(rows.held.nbytes for rows in self._tensors.values())

    def state_dict(self) -> dict[str, object]:
        """Numbers and bytes of all examples, by tensor."""
        tensors = {
            index: {"numel": rows.numel, "examples": torch.tensor(list(rows.places)), "held": rows.held[: len(rows.places)]}
            for index, rows in self._tensors.items()
        }
        return {"storage": self._storage, "tensors": tensors}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Replace all by what `state_dict` returned. Raises MismatchError where that was kept otherwise."""
        if state["storage"] != self._storage:
            raise MismatchError(
                f'{self._label}: the checkpoint holds examples in "example_memory": "{state["storage"]}", this run in '
                f'"{self._storage}"; set it to the former'
            )
        self._tensors = {}
        tensors = state["tensors"]
        assert isinstance(tensors, Mapping)
        for index, each in tensors.items():
            rows = self._tensors[index] = _Rows(each["numel"], each["held"].shape[1])
            rows.places = {example: place for place, example in enumerate(each["examples"].tolist())}
            rows.held = each["held"].clone()

    def clear(self) -> None:
        """Hold nothing."""
        self._tensors = {}

    def _grow(self, rows: _Rows) -> None:
        nbytes = rows.held.shape[1]
        more = min(max(_FIRST, len(rows.held)), (self._most - self.nbytes) // nbytes)
        if more < 1:
            raise SyncError(
                f"{self._label}: AQ-SGD holds {len(rows.held)} examples of {nbytes} bytes and may have {self._most} in all, too "
                'little for one more; raise "example_bytes", set "example_memory" to "bfloat16" or "8 bits", or give "forward" '
                "another feedback"
            )
        rows.held = torch.cat([rows.held, torch.zeros(more, nbytes, dtype=torch.uint8)])

"""What PowerSGD remembers of a unit: the error of its last approximation, and the columns that the next one starts from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..compressors.powersgd import Layout
from ..core.config import FeedbackMode
from ..core.errors import MismatchError, UnsupportedError
from ..core.memory import ResidualDtype
from .memory import Memory, Site, Tensors

_FOREIGN = "the checkpoint is of another plan or not by this package: use another one, or start without its feedback"


class Turn(NamedTuple):
    """What a unit holds at a step, and where to leave what it holds from then on: maybe the same tensors.

    Bases have the shape (layout.right_numel,), errors (layout.numel,); these are None without error feedback.
    """

    basis: Tensor
    basis_left: Tensor
    error: Tensor | None = None
    error_left: Tensor | None = None

    def stay(self) -> None:
        """Leave what is held."""
        if self.basis_left is not self.basis:
            self.basis_left.copy_(self.basis)
        if self.error is not None and self.error_left is not None and self.error_left is not self.error:
            self.error_left.copy_(self.error)


class LowRankMemory:
    """Errors and bases of all units, with the methods by which an engine treats `Feedback`: `commit`, `rollback`, `rescale`, ...

    Different sites may be used by different threads at once, one site by one thread at a time; all methods but `turn` concern
    all sites and must not run beside it.

    Args:
        mode: "ef" for error feedback (algorithm 2 of the PowerSGD paper), "none" for the warm start alone.
        dtype: of the errors, float32 or bfloat16; bases are float32.
        reversible: keep the memory of before the step until `commit` or `rollback`, at twice the size.

    Raises:
        UnsupportedError: another mode.
    """

    def __init__(self, mode: FeedbackMode = "ef", dtype: torch.dtype = torch.float32, reversible: bool = False) -> None:
        if mode not in ("ef", "none"):
            raise UnsupportedError(f'"feedback": {mode!r} with powersgd, which brings its own; set it to "ef" or "none"')
        self.mode: FeedbackMode = mode
        self.dtype = cast(ResidualDtype, str(dtype).removeprefix("torch."))
        self.scale = 1.0
        """The product of all factors of `rescale`: what gradients, and with them the errors, are multiplied by."""
        self.reversible = reversible
        self._errors = Memory(dtype, reversible)
        self._bases = Memory(torch.float32, reversible)
        self._started: set[str] = set()

    def turn(self, site: str, layout: Layout, x: Tensor, right: Tensor, seed: int) -> Turn:
        """What a step has to know and to leave.

        Args:
            site: name of the unit.
            layout: of its tensors.
            x: the unit's buffer, on the device where the memory is to be.
            right: the buffer of its second factors, on that device too.
            seed: of the first basis, equal on all ranks.

        Raises:
            MismatchError: what was loaded for the site has another size.
        """
        (basis,), (basis_left,) = self._bases.turn(site, ("basis",), right)
        if site not in self._started:
            layout.draw(basis, seed)
            self._started.add(site)
        if self.mode == "none":
            return Turn(basis, basis_left)
        (error,), (error_left,) = self._errors.turn(site, ("residual",), x)
        return Turn(basis, basis_left, error, error_left)

    def release(self, x: Tensor, site: str) -> None:
        """Add the site's error to `x`, which goes out uncompressed, and remember no error once the step is committed.

        Args:
            x: float32, shape (layout.numel,), contiguous; changed.
            site: name of the unit.

        Raises:
            MismatchError: as for `turn`.
        """
        if site in self._errors:
            (error,), (left,) = self._errors.turn(site, ("residual",), x)
            x.add_(error)
            left.zero_()

    def forget(self, sites: Iterable[str]) -> None:
        """Give the memory of `sites` back, on all ranks at once."""
        gone = list(sites)
        self._errors.forget(gone)
        self._bases.forget(gone)
        self._started.difference_update(gone)

    def commit(self) -> None:
        """Keep what was remembered since the last commit: the optimizer has taken the step."""
        self._errors.commit()
        self._bases.commit()

    def rollback(self) -> None:
        """Forget what was remembered since the last commit: the step was skipped. Raises UnsupportedError: not reversible."""
        self._errors.rollback()
        self._bases.rollback()

    def rescale(self, factor: float) -> None:
        """Follow a change of the loss scale by multiplying all errors; bases have no scale.

        Raises:
            ValueError: the factor is not positive or not finite.
        """
        if not (factor > 0 and math.isfinite(factor)):
            raise ValueError(f"powersgd: rescale by {factor}; a ratio of loss scales is positive and finite")
        if factor != 1:
            self._errors.scale(factor)
            self.scale *= factor

    def clear(self) -> None:
        """Forget everything, as before the first step. On all ranks at once, so that they start from equal bases again."""
        self._errors.clear()
        self._bases.clear()
        self._started.clear()

    @property
    def nbytes(self) -> int:
        """Memory held."""
        return self._errors.nbytes + self._bases.nbytes

    def state_dict(self) -> dict[str, Any]:
        """Errors and bases of all sites, sorted: the live tensors, to be saved or cloned before the next step.

        Raises:
            UnsupportedError: a step is neither committed nor rolled back, so nobody knows which memory goes with the weights.
        """
        if pending := self._bases.pending():
            raise UnsupportedError(
                f"powersgd: {len(pending)} sites ({pending[0]!r} ...) hold a step that is not settled; "
                "call commit() or rollback() before state_dict()"
            )
        sites: dict[str, dict[str, Tensor]] = {}
        for memory in (self._errors, self._bases):
            for name, site in memory.items():
                sites.setdefault(name, {}).update(zip(site.names, site.now, strict=True))
        return {"mode": self.mode, "dtype": self.dtype, "scale": self.scale, "sites": sites}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace all memory by copies of that in `state`; sites that it lacks start anew. A step under way is forgotten.

        Raises:
            MismatchError: saved with another mode or dtype, holds NaN or Inf, or was not written by `state_dict`.
        """
        for key, field, ours in (("mode", "feedback", self.mode), ("dtype", "residual", self.dtype)):
            if state.get(key) != ours:
                raise MismatchError(
                    f'powersgd: the checkpoint was saved with "{field}": {state.get(key)!r}, this run has {ours!r}; '
                    f"set it to {state.get(key)!r}, or start without the saved feedback"
                )
        scale, sites = state.get("scale"), state.get("sites")
        if not isinstance(scale, float | int) or not 0 < scale < math.inf or not isinstance(sites, Mapping):
            raise MismatchError(
                f"powersgd: the checkpoint's scale is {scale!r}, its sites are {type(sites).__name__}; {_FOREIGN}"
            )
        dtypes = {"basis": torch.float32} | ({"residual": self._errors.dtype} if self.mode == "ef" else {})
        found: dict[str, dict[str, Site]] = {"basis": {}, "residual": {}}
        for name, tensors in sites.items():
            if not isinstance(tensors, Mapping) or set(tensors) != set(dtypes):
                raise MismatchError(f"powersgd: site {name!r} does not hold {' and '.join(sorted(dtypes))}; {_FOREIGN}")
            for key, dtype in dtypes.items():
                found[key][name] = Site((key,), _sound(name, key, tensors[key], dtype))
        self._bases.replace(found["basis"])
        self._errors.replace(found["residual"])
        self._started, self.scale = set(sites), float(scale)


def _sound(site: str, key: str, tensor: Tensor, dtype: torch.dtype) -> Tensors:
    if tensor.dtype != dtype or tensor.dim() != 1:
        raise MismatchError(
            f"powersgd: {key} of site {site!r} is {tensor.dtype} of shape {tuple(tensor.shape)}, "
            f"not one-dimensional {dtype}; {_FOREIGN}"
        )
    if not tensor.isfinite().all():
        raise MismatchError(f"powersgd: {key} of site {site!r} holds NaN or Inf; use an earlier checkpoint")
    return (tensor.detach().clone(),)

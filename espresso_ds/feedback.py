"""Error feedback: what compression drops is remembered and added to the next gradient (Karimireddy et al., ICML 2019; Seide
et al., 2014).

At every place where a tensor is compressed, its *site*, with residual e (zeros at first):

    p = x + e;  payload = encode(p);  e = p - decode(payload)

so that, over any number of steps, decoded outputs + residual = inputs. Three choices:

- The sum is formed in the residual's own memory and encoded there with `error` being the input: one add, then the codec's own
  passes, no copy and no second buffer. x is only read, so it may be a slice of a communication buffer, and residuals never
  move.
- A step with NaN or Inf is encoded without the memory, which stays as it was: a step that a loss scaler skips must not poison all
  later ones. What is looked at is the norm of x, one read-only pass at memory speed.
- A norm under `_SAFE` bounds every |x| so far below the spacing of the largest fp32 that a finite residual plus x cannot
  overflow. Anything else, finite or not, is looked at element by element.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from .compressors.base import Codec
from .core.errors import MismatchError

_SAFE = 1e18


class Feedback:
    """Residuals by site. Different sites may be encoded by different threads at once.

    Args:
        mode: "ef" for error feedback, "none" to encode without memory.
    """

    def __init__(self, mode: Literal["ef", "none"] = "ef") -> None:
        self.mode = mode
        self._residuals: dict[str, Tensor] = {}

    def encode(self, codec: Codec, x: Tensor, payload: Tensor, seed: int, site: str) -> None:
        """Compress `x` plus the residual of `site` into `payload`, and keep what is lost.

        Args:
            codec: any codec; the same for every step of a site.
            x: float32, shape (n,), contiguous; not changed.
            payload: uint8, as `Codec.encode` wants it.
            seed: passed on to the codec.
            site: name of the place, unique per tensor and action.

        Raises:
            MismatchError: the residual of `site`, loaded or of an earlier step, has another size.
        """
        if self.mode == "none":
            codec.encode(x, payload, seed)
            return
        residual = self._residual(site, x)
        # Not `>=`: a NaN norm compares false. On an accelerator this waits for the stream.
        if not torch.linalg.vector_norm(x).item() < _SAFE and not (x + residual).isfinite().all():
            codec.encode(x, payload, seed)
            return
        residual.add_(x)
        codec.encode(residual, payload, seed, error=residual)

    def _residual(self, site: str, x: Tensor) -> Tensor:
        residual = self._residuals.get(site)
        if residual is None:
            residual = self._residuals[site] = torch.zeros_like(x)
        elif residual.numel() != x.numel():
            raise MismatchError(
                f"error feedback: site {site!r} holds a residual of {residual.numel()} elements, the tensor has {x.numel()}; "
                "the checkpoint is of another model or plan: load one of this plan, or start with empty error feedback"
            )
        elif residual.device != x.device:  # loaded from a checkpoint on another device
            residual = self._residuals[site] = residual.to(x.device)
        return residual

    @property
    def nbytes(self) -> int:
        """Memory held by residuals."""
        return sum(residual.nbytes for residual in self._residuals.values())

    def state_dict(self) -> dict[str, Tensor]:
        """Residuals by site, sorted. The tensors are the live ones, as in torch: save or clone them before the next step."""
        return {site: self._residuals[site] for site in sorted(self._residuals)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace all residuals by copies of those in `state`; sites that it lacks start from zeros.

        Raises:
            MismatchError: an entry is not a one-dimensional float32 tensor of finite values, or error feedback is off and
            `state` is not empty.
        """
        if self.mode == "none" and state:
            raise MismatchError(
                f'error feedback: the checkpoint holds {len(state)} residuals but "feedback" is "none"; '
                'set it to "ef" as when it was saved'
            )
        for site, residual in state.items():
            if residual.dtype != torch.float32 or residual.dim() != 1:
                raise MismatchError(
                    f"error feedback: residual {site!r} is {residual.dtype} of shape {tuple(residual.shape)}, "
                    "not one-dimensional float32; the checkpoint was not written by this package"
                )
            if not residual.isfinite().all():
                raise MismatchError(f"error feedback: residual {site!r} holds NaN or Inf; use an earlier checkpoint")
        self._residuals = {site: residual.detach().clone() for site, residual in state.items()}

"""What stands between a tensor and its codec: a memory of what earlier steps could not send."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from ..compressors.base import Codec
from ..compressors.parts import Parts
from ..core.config import FeedbackMode
from ..core.errors import UnsupportedError
from ..core.memory import ResidualDtype, check_memory, receiver_memory, sender_memory
from .memory import Memory
from .state import State, read


def may_sum(codec: Codec, mode: FeedbackMode) -> bool:
    """Whether payloads may be added up on their way. Not those of "ef21" in 16 bits: what a sum is rounded by would stay in the
    receivers' estimates for good, and no sender knows of it.
    """
    return codec.sum_dtype is torch.float32 or (codec.sum_dtype is not None and mode != "ef21")


class Feedback:
    """The memory of all places where one rank compresses, its *sites*; C and D stand for the codec, x for what is to be sent.

    "none": sends C(x).

    "ef": error feedback (Karimireddy et al., ICML 2019; Seide et al., Interspeech 2014). With residual e:
        p = x + e;  sends C(p);  e = p - D(C(p)).
        Over any number of steps what was decoded and the residual add up to what came in.

    "ef21": (Richtárik et al., NeurIPS 2021, algorithm 2). With h, the sender's estimate of x, which receivers know:
        sends C(x - h);  h += D(C(x - h)).
        Receivers keep H, the sum of the senders' estimates: H += what they decode, and H is the result.

    "dgc": momentum correction, local clipping and momentum factor masking (Lin et al., ICLR 2018, algorithm 4), in place of the
        optimizer's momentum. With velocity u, residual v and a local gradient x of N ranks:
        x *= min(1, clip / sqrt(N) / |x|);  u = momentum u + x;  v += u;  sends the largest of v; there u = 0 and v = what
        rounding left, elsewhere both stay.
        Sums of what was sent so already get "ef": momentum must not be applied twice.

    What happens when
        - the step is skipped (loss scale overflow): `rollback` brings back the memory of all sites to the bit, if `reversible`.
        - the loss scale changes: `rescale` multiplies all memory alike, as it is in units of the gradients.
        - the gradient is zero: what is remembered is sent all the same.
        - the gradient holds NaN or Inf, or overflows when the memory is added: that shows in what is decoded, and `rollback`
          makes it undone. Where memory is updated in place, "ef" and "dgc" are left finite but otherwise unspecified: a wrong
          residual is made good for by the steps that follow. A wrong estimate never is, since no receiver knows of it: "ef21"
          therefore keeps the NaN, and shows it in every later step, until `clear` is called on all ranks.

    Different sites may be used by different threads at once, one site by one thread at a time; `rollback` and all other methods
    that concern all sites must not run beside `encode` or `decoded`. After the first step at a site nothing is allocated.

    Args:
        mode: as above.
        dtype: of the memory, float32 or bfloat16. The latter rounds what is kept at every step, by at most 2**-8 of it.
        momentum: of "dgc".
        clip: of "dgc": most norm of what is compressed at once, a unit or the chunk or part of it that its option has, as summed
            over all ranks and at a loss scale of 1; None: no limit. Taking the norm waits for the stream on an accelerator.
        world_size: N, by which local norms are smaller than that of the sum (by its root).
        reversible: keep the memory of before the step until `commit` or `rollback`, at twice the size, for whoever skips steps.

    Raises:
        UnsupportedError: a dtype that the mode cannot have.
    """

    def __init__(
        self,
        mode: FeedbackMode = "ef",
        dtype: torch.dtype = torch.float32,
        momentum: float = 0.9,
        clip: float | None = None,
        world_size: int = 1,
        reversible: bool = False,
    ) -> None:
        self.mode: FeedbackMode = mode
        self.dtype = cast(ResidualDtype, str(dtype).removeprefix("torch."))
        check_memory(mode, self.dtype)
        self.scale = 1.0
        """The product of all factors of `rescale`: what gradients, and with them the memory, are multiplied by."""
        self._momentum = momentum
        self._local_clip = None if clip is None else clip / math.sqrt(world_size)
        self.reversible = reversible
        self._memory = Memory(dtype, reversible)
        self._buffers: dict[tuple[int, torch.device], Tensor] = {}

    def reads_parts(self, codec: Codec) -> bool:
        """Whether `encode` reads elements that lie apart without bringing them together."""
        return self.mode in ("none", "ef") and codec.reads_parts

    def encode(
        self, codec: Codec, x: Tensor | Parts, payload: Tensor, seed: int, site: str, *, recompressed: bool = False
    ) -> None:
        """Compress `x` and what is remembered at `site` into `payload`, and remember what is lost.

        Args:
            codec: contractive, unless the mode is "none"; of the same kind for every step of a site.
            x: float32, shape (n,), contiguous, or in parts; not changed.
            payload: uint8, as `Codec.encode` wants it.
            seed: passed on to the codec.
            site: name of the place, unique per tensor, action and row, and among receivers' names too.
            recompressed: whether `x` is a sum of what was encoded before, on its way through this option.

        Raises:
            MismatchError: the memory of `site`, loaded or of an earlier step, has another size.
            UnsupportedError: "dgc" with a codec that has no momentum.
        """
        names = sender_memory(self.mode, recompressed)
        if isinstance(x, Parts):
            if self.reads_parts(codec):
                (residual,), (kept,) = self._memory.turn(site, names, x) if names else ((None,), (None,))
                codec.encode_parts(x, payload, seed, residual, kept)
            else:
                self.encode(codec, x.gather(), payload, seed, site, recompressed=recompressed)
            return
        if not names:
            codec.encode(x, payload, seed)
            return
        momentum_of = _momentum_encoder(codec) if "velocity" in names else None
        held, left = self._memory.turn(site, names, x)
        if momentum_of is not None:
            (velocity, residual), (velocity_kept, kept) = held, left
            momentum_of(x, velocity, velocity_kept, residual, kept, payload, seed, self._momentum, self._clip_factor(x))
        elif self.mode == "ef21":
            self._encode_change(codec, x, payload, seed, held[0], left[0])
        else:
            codec.encode(x, payload, seed, held[0], left[0])

    def decoded(self, out: Tensor, site: str) -> None:
        """Turn what was decoded into what was meant, in place: for "ef21" changes into the sum of estimates, else nothing.

        Args:
            out: float32, shape (n,), contiguous; the sum of all payloads for these elements.
            site: name of the place, unique per tensor, action and slice, and among senders' names too.

        Raises:
            MismatchError: as for `encode`.
        """
        if names := receiver_memory(self.mode):
            (held,), (left,) = self._memory.turn(site, names, out)
            torch.add(held, out, out=left)
            out.copy_(left)

    def release(self, x: Tensor, site: str) -> None:
        """Add to `x`, which goes out uncompressed, what `site` has not sent so far, and remember nothing of it once the step is
        committed. Only "ef" has any: receivers of "ef21" need no estimate of what they get whole.

        Args:
            x: float32, shape (n,), contiguous; changed.
            site: name of the place.

        Raises:
            MismatchError: as for `encode`.
            UnsupportedError: "dgc", whose memory is the momentum of the optimizer.
        """
        if self.mode == "dgc":
            raise UnsupportedError(f'{site}: uncompressed, it would go without the momentum that "feedback": "dgc" gives it')
        if self.mode == "ef" and site in self._memory:
            (residual,), (left,) = self._memory.turn(site, sender_memory("ef"), x)
            x.add_(residual)
            left.zero_()

    def forget(self, sites: Iterable[str]) -> None:
        """Give the memory of `sites` back, on all ranks at once. What they have not sent is lost, unless it was released."""
        self._memory.forget(sites)

    def commit(self) -> None:
        """Keep what was remembered since the last commit: the optimizer has taken the step."""
        self._memory.commit()

    def rollback(self) -> None:
        """Forget what was remembered since the last commit: the step was skipped.

        Raises:
            UnsupportedError: the memory is not reversible.
        """
        self._memory.rollback()

    def rescale(self, factor: float) -> None:
        """Follow a change of the loss scale by multiplying all memory; what would overflow stays at the largest finite value.

        Args:
            factor: new scale over old one, such as `loss_scale / feedback.scale`, which is also right at the first step and after
                a checkpoint was loaded.

        Raises:
            ValueError: it is not positive or not finite.
        """
        if not (factor > 0 and math.isfinite(factor)):
            raise ValueError(f"feedback: rescale by {factor}; a ratio of loss scales is positive and finite")
        if factor != 1:
            self._memory.scale(factor)
            self.scale *= factor

    def clear(self) -> None:
        """Set all memory to zeros. On all ranks at once: "ef21" is right only if senders and receivers agree."""
        self._memory.clear()

    @property
    def nbytes(self) -> int:
        """Memory held, buffers included: "ef21" has one per encoding thread, as large as the largest tensor of that thread."""
        return self._memory.nbytes + sum(buffer.nbytes for buffer in list(self._buffers.values()))

    def state_dict(self) -> State:
        """The memory of all sites, sorted. The tensors are the live ones, as in torch: save or clone them before the next step.

        Raises:
            UnsupportedError: a step is neither committed nor rolled back, so nobody knows which memory goes with the weights.
        """
        if pending := self._memory.pending():
            raise UnsupportedError(
                f"feedback: {len(pending)} sites ({pending[0]!r} ...) hold a step that is not settled; "
                "call commit() or rollback() before state_dict()"
            )
        sites = {name: dict(zip(site.names, site.now, strict=True)) for name, site in self._memory.items()}
        return {"mode": self.mode, "dtype": self.dtype, "scale": self.scale, "sites": sites}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Replace all memory by copies of that in `state`; sites that it lacks start from zeros. A step under way is forgotten.

        Whether memory is reversible may differ from when it was saved; sizes are checked, and tensors moved to their device, when
        a site is first used.

        Raises:
            MismatchError: saved with another mode or dtype, holds NaN or Inf, or was not written by `state_dict`.
        """
        scale, sites = read(state, self.mode, self.dtype)
        self.scale = scale
        self._memory.replace(sites)

    def _encode_change(self, codec: Codec, x: Tensor, payload: Tensor, seed: int, estimate: Tensor, left: Tensor) -> None:
        change = torch.sub(x, estimate, out=self._buffer(x))
        codec.encode(change, payload, seed)
        if left is not estimate:
            left.copy_(estimate)
        codec.decode_add(payload, left, seed)  # the same addition that a receiver makes

    def _buffer(self, x: Tensor) -> Tensor:
        key = threading.get_ident(), x.device
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < x.numel():
            buffer = self._buffers[key] = torch.empty_like(x)
        return buffer[: x.numel()]

    def _clip_factor(self, x: Tensor) -> float:
        if self._local_clip is None:
            return 1.0
        norm = torch.linalg.vector_norm(x).item()
        if not math.isfinite(norm):  # squares beyond fp32, or NaN and Inf, which no factor may hide
            norm = torch.linalg.vector_norm(x, dtype=torch.float64).item()
        most = self._local_clip * self.scale
        return most / norm if most < norm < math.inf else 1.0


def _momentum_encoder(codec: Codec) -> Callable[..., Any]:
    encode: Callable[..., Any] | None = getattr(codec, "encode_momentum", None)
    if encode is None:
        raise UnsupportedError(
            f'"feedback": "dgc" with {codec.name!r}, which has no momentum; '
            'choose "dgc", "topk" or "topk_sampled", or set "feedback" to "ef"'
        )
    return encode

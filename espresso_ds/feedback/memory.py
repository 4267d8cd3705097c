"""Tensors by site that outlive a step, and a step that may be taken back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..compressors.parts import Parts
from ..core.errors import MismatchError, UnsupportedError

Tensors = tuple[Tensor, ...]


@dataclass
class Site:
    """The tensors of one place, named; `now` and `spare` are the same ones where steps cannot be taken back."""

    names: tuple[str, ...]
    now: Tensors
    spare: Tensors = ()  # none before the first use
    pending: bool = False  # whether the spare ones are ahead of those of `now`, by a step that may yet be taken back

    @property
    def newest(self) -> Tensors:
        """What the step under way has left, or the last one."""
        return self.spare if self.pending else self.now


class Memory:
    """Sites by name. One site belongs to one thread at a time, different ones may be used at once; all else wants quiet.

    Args:
        dtype: of all tensors.
        reversible: whether a step writes beside what was there, to be kept by `commit` or taken back by `rollback`; otherwise
            it writes in place.
    """

    def __init__(self, dtype: torch.dtype, reversible: bool) -> None:
        self.dtype = dtype
        self.reversible = reversible
        self._sites: dict[str, Site] = {}

    def turn(self, name: str, names: tuple[str, ...], x: Tensor | Parts) -> tuple[Tensors, Tensors]:
        """What a site holds, zeros at first, and where to leave what it holds from now on: maybe the same tensors.

        Args:
            name: of the site.
            names: of its tensors.
            x: shape (n,), on the device where the tensors are to be; they have its shape.

        Raises:
            MismatchError: the site, loaded or of an earlier step, holds other tensors or another size.
        """
        site = self._sites.get(name)
        if site is None:
            site = self._sites[name] = Site(
                names, tuple(torch.zeros(x.numel(), dtype=self.dtype, device=x.device) for _ in names)
            )
        elif site.names != names or site.now[0].numel() != x.numel():
            raise MismatchError(
                f"feedback: site {name!r} holds {' and '.join(site.names)} of {site.now[0].numel()} elements, what is compressed "
                f"there needs {' and '.join(names)} of {x.numel()}; the checkpoint is of another model or plan: load one of this "
                "plan, or start without the saved feedback"
            )
        elif site.now[0].device != x.device:  # loaded from a checkpoint of another device
            site.now, site.spare = tuple(tensor.to(x.device) for tensor in site.newest), ()
        if not site.spare:
            site.spare = tuple(map(torch.empty_like, site.now)) if self.reversible else site.now
        held, site.pending = site.newest, self.reversible
        return held, site.spare

    def __contains__(self, name: str) -> bool:
        """Whether the site holds anything."""
        return name in self._sites

    def commit(self) -> None:
        """Keep what was left since the last commit."""
        for site in self._sites.values():
            if site.pending:
                site.now, site.spare, site.pending = site.spare, site.now, False

    def rollback(self) -> None:
        """Take back what was left since the last commit.

        Raises:
            UnsupportedError: it was written in place.
        """
        if not self.reversible:
            raise UnsupportedError("feedback: a step cannot be taken back where memory is updated in place; set reversible=True")
        for site in self._sites.values():
            site.pending = False

    def pending(self) -> list[str]:
        """Sites that hold a step neither kept nor taken back yet."""
        return sorted(name for name, site in self._sites.items() if site.pending)

    def scale(self, factor: float) -> None:
        """Multiply everything; what would overflow stays at the largest finite value."""
        largest = torch.finfo(self.dtype).max
        for site in self._sites.values():
            for tensor in (*site.now, *site.spare) if site.pending else site.now:
                tensor.mul_(factor).clamp_(-largest, largest)

    def clear(self) -> None:
        """Set everything to zeros, as before the first step."""
        for site in self._sites.values():
            site.pending = False
            for tensor in site.now:
                tensor.zero_()

    def forget(self, names: Iterable[str]) -> None:
        """Give the memory of sites back; those that are not there are passed over."""
        for name in names:
            self._sites.pop(name, None)

    def replace(self, sites: dict[str, Site]) -> None:
        """Forget all sites and hold these instead."""
        self._sites = sites

    def items(self) -> Iterator[tuple[str, Site]]:
        """Sites by name, sorted."""
        return iter(sorted(self._sites.items()))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, spare ones included."""
        held = (tensor for site in list(self._sites.values()) for tensor in (*site.now, *site.spare))
        return sum({id(tensor): tensor.nbytes for tensor in held}.values())

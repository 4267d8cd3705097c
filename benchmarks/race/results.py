"""What the race writes, a file for each cell: one model on one cluster at one rate, all its variants."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveInt

from espresso_ds.core.errors import FileError
from espresso_ds.core.people import people_bit_per_s
from espresso_ds.core.record import FileRecord, Record

from ..timed import TimedSteps

BOUND = "compute only"
PLAIN = "deepspeed fp32"
CAST_HOOKS = ("ddp fp16", "ddp bf16")
OURS = "espresso"
"""The plan that the bars are about; others of ours stand beside it in tables."""

REPLANNED = "espresso replanned"
"""Made by `espresso replan` from some steps of the first, so its predicted step is that of profiles fitted to a run."""

UNSHAPED = "none"
_BITS: Mapping[str, float] = MappingProxyType({"kbit": 1e3, "mbit": 1e6, "gbit": 1e9})


def _finite(loss: object) -> object:
    return None if isinstance(loss, float) and not math.isfinite(loss) else loss


Loss = Annotated[float | None, BeforeValidator(_finite)]
"""A held-out loss; None: training diverged."""


class Variant(TimedSteps):
    """One way to train, timed.

    Attributes:
        kind: the bound (no synchronisation), a peer, a plan of ours, or a plan from a search that lacks something.
        cpu_s: CPU seconds of all ranks together for a step, by turn.
        sent_bytes: a host's bytes for a step by its interface's counter, median.
        exposed_communication_s: of a step, waiting for links after backward; measured from a plan's spans.
        exposed_compression_s: of a step, waiting for codecs after backward while no link works.
        note: what a reader of the figures should know.
    """

    kind: Literal["bound", "peer", "ours", "crippled"]
    cpu_s: list[NonNegativeFloat] | None = None
    sent_bytes: NonNegativeFloat | None = None
    exposed_communication_s: NonNegativeFloat | None = None
    exposed_compression_s: NonNegativeFloat | None = None
    note: str = ""

    @property
    def quartiles_s(self) -> tuple[float, float]:
        """First and third quartile of the steps; of a single step, itself twice."""
        if len(self.step_s) == 1:
            return self.step_s[0], self.step_s[0]
        first, _, third = statistics.quantiles(self.step_s, n=4, method="inclusive")
        return first, third


class Losses(Record):
    """Held-out loss after equal steps, one for each seed."""

    steps: PositiveInt
    final: list[Loss] = Field(min_length=1)

    @property
    def mean(self) -> float:
        """Mean over the seeds; infinite if any diverged."""
        return statistics.fmean(math.inf if loss is None else loss for loss in self.final)


class CellResult(FileRecord):
    """All variants of one model on one cluster at one rate, interleaved in one run."""

    KIND: ClassVar[str] = "race result"
    MADE_BY: ClassVar[str] = "python -m benchmarks.race"

    schema_version: int = 1
    model: str
    nodes: PositiveInt
    ranks_per_node: PositiveInt
    rate: Annotated[str, Field(pattern=rf"^(none|\d+(\.\d+)?({'|'.join(_BITS)}))$")]
    machine: dict[str, str | int | float]
    rounds: PositiveInt
    steps_per_turn: PositiveInt
    codecs: tuple[str, ...] = Field((), description="offered to the planner; empty: EF-SignSGD, 4 and 8 bits, bf16")
    variants: dict[str, Variant]
    losses: dict[str, Losses] = Field(default_factory=dict)

    @property
    def rate_bit_per_s(self) -> float:
        """The links' rate; infinite if they are not shaped."""
        if self.rate == UNSHAPED:
            return math.inf
        number, unit = re.findall(r"[\d.]+|[a-z]+", self.rate)
        return float(number) * _BITS[unit]

    @property
    def shaped(self) -> bool:
        """Whether links are slowed down."""
        return self.rate != UNSHAPED

    @property
    def cluster(self) -> str:
        """Hosts and ranks of each, `2x1`."""
        return f"{self.nodes}x{self.ranks_per_node}"

    @property
    def link(self) -> str:
        """The rate for people."""
        return people_bit_per_s(self.rate_bit_per_s) if self.shaped else "unshaped"

    @property
    def name(self) -> str:
        """`gpt2-30m 2x1 200 Mbit/s`."""
        return f"{self.model} {self.cluster} {self.link}"

    def step_s(self, name: str) -> float | None:
        """Median step of a variant, None where it did not run."""
        return self.variants[name].median_s if name in self.variants else None

    def fastest(self, names: tuple[str, ...] | None = None) -> str | None:
        """The peer with the smallest median step, of `names` if given; None where none ran."""
        peers = {name: each for name, each in self.variants.items() if each.kind == "peer" and (names is None or name in names)}
        return min(peers, key=lambda name: peers[name].median_s, default=None)


def load_cells(folder: Path) -> list[CellResult]:
    """All cells of a folder, by model, cluster and rate, unshaped last.

    Raises:
        FileError: there are none, or one is not a race result.
    """
    cells = [CellResult.load(path) for path in sorted(folder.glob("*.json"))]
    if not cells:
        raise FileError(f"{folder}: no race results; make them with `{CellResult.MADE_BY}`")
    return in_order(cells)


def in_order(cells: list[CellResult]) -> list[CellResult]:
    """By model (5m before 30m), cluster and rate, unshaped last."""
    return sorted(cells, key=lambda c: (_natural(c.model), c.nodes * c.ranks_per_node, -c.nodes, c.rate_bit_per_s))


def _natural(text: str) -> list[tuple[int, str]]:
    return [(int(part or 0), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", text)]

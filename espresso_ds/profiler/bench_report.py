"""What `espresso bench` asks for and reports, as records, and the formulas of bandwidths. No torch: the command reads this.

Sizes and formulas are those of nccl-tests (doc/PERFORMANCE.md there), so that figures can be laid beside theirs. The size S of
a routine is that of its larger buffer: what every rank gives, or all that is gathered. In t seconds on n ranks

    algorithm bandwidth = S / t        bus bandwidth = factor(n) * S / t

where the factor is the share of S that each rank has to send and to receive at least, so that bus bandwidth does not depend on n
and may be compared with the rate of a link.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from statistics import median
from types import MappingProxyType
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from ..core.errors import FileError
from ..core.option import Level
from ..core.record import Record

P2P = "p2p"
FAULT = "espresso bench net: "
"""How a rank's line begins that says why it cannot measure."""
_MARK, _CHUNK = "@result ", 500
BUS_FACTORS: Mapping[str, Callable[[int], float]] = MappingProxyType(
    {
        "allreduce": lambda n: 2 * (n - 1) / n,
        "allgather": lambda n: (n - 1) / n,
        "reduce_scatter": lambda n: (n - 1) / n,
        "alltoall": lambda n: (n - 1) / n,
        "gather": lambda n: (n - 1) / n,
        "broadcast": lambda n: 1.0,
        "reduce": lambda n: 1.0,
        P2P: lambda n: 1.0,
    }
)
"""Bus bandwidth over algorithm bandwidth of every routine that can be measured, by the number of ranks."""

DTYPES: Mapping[str, int] = MappingProxyType({"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2, "int32": 4, "uint8": 1})
"""Bytes of one element."""

Backend = Literal["gloo", "nccl", "mpi"]


class NetSettings(Record):
    """What to measure."""

    routines: tuple[str, ...]
    sizes: tuple[PositiveInt, ...]
    """Bytes, ascending; rounded up to whole elements in equal rows of all ranks."""
    levels: tuple[Level, ...] = ()
    """Empty: all that there are."""
    backend: Backend | None = None
    dtype: str = "float32"
    trials: PositiveInt = 10
    longest_s: PositiveFloat = 2.0
    """A routine's larger sizes are left out once one took longer."""
    timeout_s: PositiveFloat = 120.0


class NetRow(Record):
    """One routine at one size between one kind of groups of ranks. Times are those of the slowest rank."""

    routine: str
    where: str
    level: Level
    ranks: PositiveInt
    groups: PositiveInt
    """How many groups at work share a host's network card."""
    nbytes: PositiveInt
    in_a_row: PositiveInt
    """Calls of one trial; its time is their mean."""
    seconds: tuple[PositiveFloat, ...]
    """Of one call, by trial."""
    median_s: PositiveFloat
    algorithm_bytes_per_s: PositiveFloat
    bus_bytes_per_s: float
    slowest_rank: int
    """The rank that was over 5% slower than the median rank in most trials, or -1."""
    wrong: int
    """Elements with a wrong value, over all ranks."""
    link_share: float | None = None
    """Bus bandwidth of all groups that share a link, over that link's rate from one rank to another."""

    @classmethod
    def of(cls, routine: str, nbytes: int, ranks: int, seconds: tuple[float, ...], **others: object) -> NetRow:
        """The row with its bandwidths worked out."""
        typical_s = median(seconds)
        rate = nbytes / typical_s
        derived = {"median_s": typical_s, "algorithm_bytes_per_s": rate, "bus_bytes_per_s": BUS_FACTORS[routine](ranks) * rate}
        given = {"routine": routine, "nbytes": nbytes, "ranks": ranks, "seconds": seconds}
        return cls.model_validate({**given, **derived, **others})


class NetReport(Record):
    """All that was measured."""

    espresso: str
    backend: Backend
    library: str
    """The communication library and its version."""
    hosts: tuple[str, ...]
    ranks_per_node: PositiveInt
    dtype: str
    trials: PositiveInt
    machine: dict[str, str | int | float]
    """Of rank 0's host."""
    rows: tuple[NetRow, ...]
    left_out: tuple[str, ...] = ()
    """Which sizes were not measured, and why."""

    def link(self, level: Level) -> Level:
        """The level of the link that limits a routine of `level`."""
        if level is Level.FLAT:
            return Level.INTER if len(self.hosts) > 1 else Level.INTRA
        return level

    def link_rows(self) -> dict[Level, tuple[NetRow, ...]]:
        """The measurements of each link, from one rank to another, ascending by size."""
        rows = [row for row in self.rows if row.routine == P2P]
        return {level: tuple(row for row in rows if row.level is level) for level in dict.fromkeys(row.level for row in rows)}

    def with_link_shares(self) -> NetReport:
        """The report with every row's `link_share`, for links that were measured.

        A link's rate is that of its largest message: shapers and buffers let small ones pass faster.
        """
        rates = {level: rows[-1].algorithm_bytes_per_s for level, rows in self.link_rows().items()}

        def shared(row: NetRow) -> NetRow:
            rate = rates.get(self.link(row.level))
            return row.model_copy(update={"link_share": row.groups * row.bus_bytes_per_s / rate if rate else None})

        return self.model_copy(update={"rows": tuple(map(shared, self.rows))})


def write_report(report: NetReport) -> None:
    """Print the report as lines `@result ...`."""
    text = report.model_dump_json()
    for start in range(0, len(text), _CHUNK):
        print(_MARK + text[start : start + _CHUNK], flush=True)


def read_report(lines: Iterable[str]) -> NetReport:
    """Put together what `write_report` printed among other lines. Raises FileError where it is not whole."""
    text = "".join(line.partition(_MARK)[2].removesuffix("\n") for line in lines if _MARK in line)
    try:
        return NetReport.model_validate_json(text)
    except ValueError as error:
        raise FileError(f"the ranks' report did not arrive whole ({error}); run it again") from None


class CodecRow(Record):
    """One codec at one size. Rates are bytes of fp32 input per second, medians over the trials."""

    codec: str
    nbytes: PositiveInt
    """Of the fp32 input."""
    encode_bytes_per_s: PositiveFloat
    encode_share: float
    """Of the rate of `r += g` over the same arrays, as the median of every trial's own ratio."""
    decode_bytes_per_s: PositiveFloat
    decode_share: float
    """Of the rate of a copy."""
    payload_ratio: float
    """Payload bytes over input bytes."""
    encode_s: tuple[PositiveFloat, ...]
    decode_s: tuple[PositiveFloat, ...]


class CodecFacts(Record):
    """What does not depend on the size."""

    codec: str
    relative_error: float
    """Share of the squared norm of Gaussian data that one encoding, without feedback, does not carry."""
    kernels: dict[str, str] = Field(description="what worked: by `encode` and `decode`, such as `native AVX2` or `plain torch`")


class LimitRow(Record):
    """What memory allows at one size, measured among the codecs."""

    nbytes: PositiveInt
    add_bytes_per_s: PositiveFloat
    """`r += g`, in bytes of g: 12 bytes are moved for 4 of them."""
    copy_bytes_per_s: PositiveFloat
    """In bytes of what is copied: 8 are moved for 4."""


class CodecReport(Record):
    """All that was measured."""

    espresso: str
    device: str
    threads: PositiveInt
    trials: PositiveInt
    machine: dict[str, str | int | float]
    codecs: tuple[CodecFacts, ...]
    limits: tuple[LimitRow, ...]
    rows: tuple[CodecRow, ...]

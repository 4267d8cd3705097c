"""Corrections in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..core.option import Task
from ..core.profile import CompressorProfile
from .cost import Costs, Resource
from .refit_compute import Compute
from .refit_costs import Line
from .refit_profiles import CodecKey, RoutineKey
from .refit_record import Correction

_WORDS = {Task.COMPRESS: "encoding", Task.DECOMPRESS: "decoding"}


def of_compute(compute: Compute, costs: Costs, steps: int) -> Iterator[Correction]:
    """The model's own compute and what disturbs it."""
    before = "marked in the run" if compute.known else "as backward: the run does not mark when its backward begins"
    yield Correction(what="forward, optimizer and data", scale=compute.before, samples=steps, why=before)
    yield Correction(
        what="backward", scale=compute.backward, samples=steps, why="ready times, less what codecs and links took of the cores"
    )
    delays = (
        ("codec work", costs.contention, compute.contention),
        ("a busy link", costs.link_contention, compute.link_contention),
    )
    for what, old, new in delays:
        why = f"a second of it delays backward by {new:.2f} s, not {old:.2f} s"
        yield Correction(what=f"contention of {what}", scale=new / old if old > 0 else 1.0, samples=steps, why=why)


def of_codecs(codecs: Mapping[CodecKey, Line], compressors: CompressorProfile) -> Iterator[Correction]:
    """Codec work, and what stands for codecs that did not run."""
    for (number, device, task), line in sorted(codecs.items()):
        label = compressors.codecs[number].compressor.label
        yield _of_line(f"{_WORDS[task]}, {label}, {device}", line)
    idle = [codec for number, codec in enumerate(compressors.codecs) if not any(key[0] == number for key in codecs)]
    if codecs and idle:
        names = ", ".join(codec.compressor.label for codec in idle)
        yield Correction(
            what="other codecs", samples=0, why=f"{names}: not used in the run, so corrected like the slowest that was"
        )


def of_links(links: Mapping[Resource, Line], routines: Mapping[tuple[Resource, RoutineKey], Line]) -> Iterator[Correction]:
    """Links, and routines beside them."""
    for link, line in sorted(links.items()):
        yield _of_line("link inside the node" if link is Resource.INTRA else "link between nodes", line)
    for (_, (task, level, _)), line in sorted(routines.items()):
        yield _of_line(f"{task}.{level} beside its link", line)


def of_overhead(unexplained_s: float, steps: int) -> Correction:
    """What remains of the step."""
    why = "what the above leaves unexplained; the same for every plan"
    return Correction(what="overhead of every step", offset_s=unexplained_s, samples=steps, why=why)


def _of_line(what: str, line: Line) -> Correction:
    why = f"seen in {line.units} unit{'s' if line.units != 1 else ''}, followed to {100 * line.sure:.0f}%"
    return Correction(what=what, scale=line.scale, offset_s=line.offset_s, samples=line.units, why=why)

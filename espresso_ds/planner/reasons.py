"""Why each unit goes as it does: what its choice saves, and what the runner-up would cost."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.profile import ModelTrace
from .limits import Limits
from .menu import Menu
from .timeline import Unit
from .trials import Trials

_ANY = float("inf")


def reasons(units: Sequence[Unit], trace: ModelTrace, menu: Menu, limits: Limits) -> list[tuple[float, str]]:
    """For each unit the seconds that its choice saves against the best uncompressed one, and the reason in words."""
    trials = Trials(units, trace, menu)
    found = []
    for place, unit in enumerate(units):
        saves_s = trials.best(place, menu.uncompressed, _ANY)[0] - trials.time if unit.option.compresses else 0.0
        if place < trials.hidden and not unit.option.compresses:
            found.append((saves_s, "hidden: sent before a bubble, compressing gains nothing"))
            continue
        front = limits.allowed(trials, place, menu.front(unit.numel))
        lossy = [c for c in front.tolist() if menu.choices[c].option.compresses and c != trials.choice(place)]
        others = front[[c in lossy for c in front.tolist()]]
        more = ""
        if len(others):
            time, other = trials.best(place, others, _ANY)
            more = f"{_name(other, unit, menu)} {_more(time - trials.time)}"
        if not unit.option.compresses:
            text = f"not worth compressing: the best way, {more}" if more else "may not be compressed: no option is left for it"
        else:
            text = f"saves {_ms(saves_s)} against uncompressed" + (f"; next best {more}" if more else "")
        found.append((saves_s, text))
    return found


def _name(choice: int, unit: Unit, menu: Menu) -> str:
    option, codec = menu.choices[choice]
    named = len(menu.costs.codecs) > 1 and (codec != unit.codec or not unit.option.compresses)
    return f"{option}" + (f" with {menu.costs.codecs[codec].compressor.label}" if named else "")


def _more(seconds: float) -> str:
    """How another option compares. One that is better alone does occur: thrift gives time for fewer compressed tensors."""
    if abs(seconds) < 5e-7:
        return "takes as long"
    return f"costs {_ms(seconds)} more" if seconds > 0 else f"would save {_ms(-seconds)}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"

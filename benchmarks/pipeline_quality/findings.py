"""The paper's findings, each asked of a study: does it hold here, and by which figures.

All are about harm: by how much the metric is worse than plain DeepSpeed's, in its own unit, as the mean over the seeds; a
training that diverged is infinitely worse. A difference of `much` (models.py) is one that matters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from .methods import AQ_PERCENT, EF_PERCENT, NONE, TOPK_PERCENT, quantize_name, topk_name
from .models import MODELS
from .results import Evaluation, Study

STRONG_PERCENT = 10
"""TopK of which the paper says that it is the strongest that does not hurt much."""
AQ_LIMIT_PERCENT = 30
RISE_PERCENT = 20
"""TopK at which the paper's GPT-2 began to lose."""
MIRRORED = ((8, 4), (8, 2), (4, 2))
"""Bits of quantization: once the milder ones for activations, once for gradients."""

UNTRAINED = 10
"""Harm in units of `much` from which on a model has learnt too little for its evaluation to say anything."""


class Finding(NamedTuple):
    """A finding and what became of it.

    Attributes:
        text: the paper's.
        holds: None where runs are missing.
        figures: for people.
    """

    text: str
    holds: bool | None
    figures: str


class Missing(Exception):
    """A method that a finding is about did not run."""


class Harm:
    """By how much a study's methods are worse than plain DeepSpeed."""

    def __init__(self, study: Study) -> None:
        self.study, self.model = study, MODELS[study.model]
        self.much = self.model.much

    def __call__(self, method: str, evaluation: Evaluation = "compressed") -> float:
        """Raises Missing."""
        plain, found = self.study.spread(NONE, evaluation), self.study.spread(method, evaluation)
        if plain is None or found is None:
            raise Missing
        if math.isinf(found.mean):
            return math.inf
        return plain.mean - found.mean if self.model.higher_is_better else found.mean - plain.mean

    def text(self, value: float) -> str:
        """As people read it; negative is better than plain DeepSpeed."""
        return "diverged" if not math.isfinite(value) else f"{value:+.{1 if self.much >= 1 else 3}f}"

    def each(self, values: dict[str, float]) -> str:
        """`50%: +0.1, 30%: +0.3`."""
        return ", ".join(f"{name}: {self.text(value)}" for name, value in values.items())


def findings(study: Study) -> list[Finding]:
    """All that can be asked of a study's model."""
    harm, found = Harm(study), []
    for text, ask in _QUESTIONS:
        if ask is _rise and study.model != "text":
            continue
        try:
            found.append(Finding(text, *ask(harm)))
        except Missing:
            found.append(Finding(text, None, "not all of its methods ran"))
    return found


Answer = tuple[bool, str]


def _milder(harm: Harm) -> Answer:
    pairs = {pair: (harm(quantize_name(*pair)), harm(quantize_name(*pair[::-1]))) for pair in MIRRORED}
    words = (
        f"fw{mild} bw{strong} {harm.text(gradients)} and fw{strong} bw{mild} {harm.text(activations)}"
        for (mild, strong), (gradients, activations) in pairs.items()
    )
    total_gradients, total_activations = (sum(column) for column in zip(*pairs.values(), strict=True))
    return total_gradients > total_activations, "; ".join(words)


def _strongest(harm: Harm) -> Answer:
    values = {k: harm(topk_name(k)) for k in TOPK_PERCENT}
    fine = list(_while(values, lambda value: value <= harm.much))
    return fine[-1:] == [STRONG_PERCENT], f"strongest here: {f'{fine[-1]}%' if fine else 'none'} ({harm.each(_percent(values))})"


def _rise(harm: Harm) -> Answer:
    values = {k: harm(topk_name(k)) for k in TOPK_PERCENT}
    fine = list(_while(values, lambda value: value <= harm.much / 2))
    first = next((k for k in TOPK_PERCENT if k not in fine), None)
    where = "nowhere" if first is None else f"at {first}%"
    return first == RISE_PERCENT, f"harm passes {harm.text(harm.much / 2)} {where} ({harm.each(_percent(values))})"


def _only_with(harm: Harm) -> Answer:
    drops = {k: harm(topk_name(k), "uncompressed") - harm(topk_name(k)) for k in TOPK_PERCENT if k <= STRONG_PERCENT}
    return all(drop > harm.much for drop in drops.values()), f"worse without compression by {harm.each(_percent(drops))}"


def _no_better(harm: Harm) -> Answer:
    gains = {(m, k): harm(topk_name(k)) - harm(topk_name(k, m)) for m in ("ef", "ef21") for k in EF_PERCENT}
    shown = {f"{memory} {k}%": gain for (memory, k), gain in gains.items()}
    return not any(gain > harm.much for gain in gains.values()), f"better than TopK alone by {harm.each(shown)}"


def _lossless(memory: str) -> Callable[[Harm], Answer]:
    def ask(harm: Harm) -> Answer:
        both = {k: (harm(topk_name(k, memory)), harm(topk_name(k, memory), "uncompressed")) for k in EF_PERCENT}
        drops = {k: without - compressed for k, (compressed, without) in both.items() if compressed <= UNTRAINED * harm.much}
        failed = [f"{k}%" for k in EF_PERCENT if k not in drops]
        words = [f"worse without compression by {harm.each(_percent(drops))}"] if drops else []
        words += [f"learnt nothing with {', '.join(failed)}"] if failed else []
        return bool(drops) and all(drop <= harm.much for drop in drops.values()), "; ".join(words)

    return ask


def _aqsgd(harm: Harm) -> Answer:
    values = {k: harm(topk_name(k, "aqsgd")) for k in AQ_PERCENT}
    holds = all((value > harm.much) == (k < AQ_LIMIT_PERCENT) for k, value in values.items())
    return holds, harm.each(_percent(values))


def _shared(harm: Harm) -> Answer:
    gains = {k: harm(topk_name(k)) - harm(topk_name(k, "shared")) for k in TOPK_PERCENT}
    bad = [k for k, gain in gains.items() if not gain >= -harm.much and not _both_diverged(harm, k)]
    return not bad, f"better than with indices of its own by {harm.each(_percent(gains))}"


def _both_diverged(harm: Harm, k: int) -> bool:
    return math.isinf(harm(topk_name(k))) and math.isinf(harm(topk_name(k, "shared")))


_QUESTIONS: Sequence[tuple[str, Callable[[Harm], Answer]]] = (
    ("gradients need milder compression than activations", _milder),
    (f"TopK {STRONG_PERCENT}% is the strongest that does not hurt much", _strongest),
    (f"GPT-2's loss starts to rise at TopK {RISE_PERCENT}%", _rise),
    (f"trained with TopK {STRONG_PERCENT}% or less, it is good only if evaluated with it", _only_with),
    ("error feedback does not improve training", _no_better),
    ("trained with EF, it is nearly as good without compression", _lossless("ef")),
    ("trained with EF21, it is nearly as good without compression", _lossless("ef21")),
    (f"AQ-SGD with TopK stronger than {AQ_LIMIT_PERCENT}% is clearly worse, with milder ones not", _aqsgd),
    ("shared indices are no worse than independent ones", _shared),
)


def _while(values: dict[int, float], fine: Callable[[float], bool]) -> Iterator[int]:
    """Densities from mild to strong, up to the first that is not fine."""
    for k, value in values.items():
        if not fine(value):
            return
        yield k


def _percent(values: dict[int, float]) -> dict[str, float]:
    return {f"{k}%": value for k, value in values.items()}

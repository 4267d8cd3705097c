"""The study for people: markdown with tables for each model and what became of the paper's findings.

python -m benchmarks.pipeline_quality report [--results FOLDER] [--models image,text]
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from .findings import findings
from .methods import METHODS, NONE
from .models import MODELS
from .results import Evaluation, Spread, Study, load_studies, spread

_HEADS = ("method", "evaluated with compression", "without", "training loss at the end", "seeds")
_VERDICTS = {True: "yes", False: "no", None: "-"}


def main(arguments: Sequence[str], results: Path) -> None:
    """Run `report` with its arguments; `results` is the default folder of results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipeline_quality report", description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=results, help="folder (default: %(default)s)")
    parser.add_argument("--models", help="comma-separated (default: all)")
    given = parser.parse_args(arguments)
    studies = [study for study in load_studies(given.results) if not given.models or study.model in given.models.split(",")]
    print("\n\n".join(map(markdown, studies)))


def markdown(study: Study) -> str:
    """A heading, the tables of methods, and the findings."""
    return "\n\n".join([f"## {study.model.capitalize()} model", _about(study), _methods(study), "Findings:", _findings(study)])


def _about(study: Study) -> str:
    setup = ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in study.setup.items())
    machine = f"{study.machine.get('processor', '?')}, {study.machine.get('cores', '?')} cores, {study.machine.get('taken', '?')}"
    seeds = f"seeds {', '.join(map(str, study.seeds()))}" if study.runs else "no runs yet"
    seconds = statistics.median(run.seconds for run in study.runs) if study.runs else 0
    return f"{study.metric[0].upper()}{study.metric[1:]}; {setup}; {seeds}; {seconds:.0f} s a run (median); {machine}."


def _methods(study: Study) -> str:
    """A table for each family, plain DeepSpeed on top of each."""
    families = dict.fromkeys(method.family for method in METHODS.values() if method.name != NONE)
    ran = {run.method for run in study.runs}
    tables = []
    for family in families:
        names = [method.name for method in METHODS.values() if method.family == family and method.name in ran]
        if names:
            tables.append(f"{family}:\n\n{_markdown(_HEADS, [_row(study, name) for name in (NONE, *names)])}")
    return "\n\n".join(tables)


def _row(study: Study, method: str) -> list[str]:
    runs = [run for run in study.runs if run.method == method]
    training = _number(spread([run.training_loss for run in runs]), 3) if runs else "-"
    return [method, _cell(study, method, "compressed"), _cell(study, method, "uncompressed"), training, str(len(runs))]


def _cell(study: Study, method: str, evaluation: Evaluation) -> str:
    return _number(study.spread(method, evaluation), 1 if MODELS[study.model].much >= 1 else 3)


def _number(found: Spread | None, digits: int) -> str:
    if found is None:
        return "-"
    if math.isinf(found.mean):
        return "diverged"
    return f"{found.mean:.{digits}f}" + ("" if found.deviation is None else f" ± {found.deviation:.{digits}f}")


def _findings(study: Study) -> str:
    rows = [[each.text, _VERDICTS[each.holds], each.figures] for each in findings(study)]
    return _markdown(["the paper found", "holds here", "figures"], rows)


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

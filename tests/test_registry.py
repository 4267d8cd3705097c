"""The registry: names, parameters, feedback, and the page that lists them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from codec_cases import VALUES

from espresso_ds.compressors import topk
from espresso_ds.compressors.registry import CODECS, check, make, resolve
from espresso_ds.core.config import STRENGTH, CompressorSettings
from espresso_ds.core.errors import EspressoError

PAGE = (Path(__file__).parents[1] / "docs" / "codecs.md").read_text(encoding="utf-8")
LOW_RANK = {"rank"}
"""Parameters of PowerSGD, which is not a codec of one tensor's bytes and not in this table."""


def settings(**given) -> CompressorSettings:
    return CompressorSettings.model_validate(given)


@pytest.mark.parametrize("name", CODECS)
def test_codecs_know_their_names_and_compare_by_value(name):
    codec = make(settings(name=name))
    assert codec.name == name and codec == make(settings(name=name)) and hash(codec) == hash(make(settings(name=name)))
    assert all(getattr(codec, parameter) == default for parameter, default in CODECS[name].parameters.items())


def test_every_parameter_is_somebodys():
    assert {parameter for entry in CODECS.values() for parameter in entry.parameters} == set(STRENGTH) - LOW_RANK
    assert make(settings(name="topk", density=0.2)) == topk.TopK(0.2)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"name": "topkk"}, "unknown codec 'topkk'; did you mean 'topk'"),
        ({"name": "xyz"}, "known: bf16, dgc, efsignsgd"),
        (
            {"name": "efsignsgd", "density": 0.1},
            "efsignsgd has no density (given: 0.1); it takes no parameters; remove 'density'",
        ),
        ({"name": "quantize", "density": 0.1}, "it takes bits, range"),
        ({"name": "topk", "bits": 4}, "it takes density"),
        ({"name": "topk", "warmup_steps": 0}, "topk has no warmup_steps (given: 0)"),
        ({"name": "qsgd", "bits": 1}, "qsgd takes 2 to 8 bits, one of them the sign, not 1; for one bit use efsignsgd"),
        ({"name": "signsgd", "feedback": "ef"}, "around SignSGD(vote='majority'), which is not contractive"),
        ({"name": "signsgd", "feedback": "ef21"}, 'set "feedback" to "none", or choose a codec such as efsignsgd or onebit'),
        ({"name": "terngrad", "feedback": "ef"}, 'set "feedback" to "none"'),
        ({"name": "qsgd", "bits": 5, "feedback": "ef"}, "QSGD(bits=5), which is not contractive"),
        ({"name": "quantize", "bits": 1, "range": "absmax"}, "Quantize(bits=1, range='absmax'), which is not contractive"),
        ({"name": "efsignsgd", "feedback": "dgc"}, 'which takes no momentum; set "feedback" to "ef", or choose topk or'),
        ({"name": "topk", "clip": 1.0}, '"clip" (1) belongs to "feedback": "dgc", not to "ef"; remove "clip"'),
        ({"name": "topk", "feedback": "ef21", "residual": "bfloat16"}, 'set "residual" to "float32"'),
    ],
)
@pytest.mark.parametrize("refuse", (check, make, resolve))
def test_senseless_settings_are_named(given, message, refuse):
    with pytest.raises(EspressoError) as caught:
        refuse(settings(**given))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        {"name": "qsgd", "bits": 6, "feedback": "ef"},
        {"name": "natural", "feedback": "ef21"},
        {"name": "quantize", "bits": 1, "range": "absmax", "feedback": "none"},
        {"name": "topk", "feedback": "dgc", "clip": 1.0, "residual": "bfloat16"},
        {"name": "dgc", "feedback": "ef"},
    ],
)
def test_what_is_sensible_is_taken(given):
    check(settings(**given))
    assert resolve(settings(**given)) == settings(**given), "feedback that is given stays"


@pytest.mark.parametrize("name", CODECS)
def test_every_codec_has_feedback_that_it_can_have(name):
    resolved = resolve(settings(name=name, seed=3))
    assert resolved.feedback == CODECS[name].feedback
    assert resolved == settings(name=name, seed=3, feedback=CODECS[name].feedback) == resolve(resolved)
    codec = make(resolved)
    assert codec.contractive or resolved.feedback == "none"


def test_the_page_lists_every_codec_with_its_defaults():
    table, sources = PAGE.split("## Sources")
    rows = {name: row for row in table.splitlines() for name in re.findall(r"^\| `(\w+)` \|", row)}
    assert list(rows) == list(CODECS), "the same names in the same order"
    for name, entry in CODECS.items():
        _, _, parameters, kind, _, _, feedback, summable, _ = map(str.strip, re.split(r"(?<!\\)\|", rows[name]))
        for parameter, default in entry.parameters.items():
            assert re.search(rf"{parameter}[^,]*\({re.escape(str(default))}\)", parameters), (name, parameter)
            assert parameter in VALUES
        codec = make(settings(name=name))
        assert feedback == entry.feedback and bool(summable) is (codec.sum_dtype is not None), name
        if name != "identity":
            assert ("unbiased" in kind) is codec.unbiased, name
            assert not codec.contractive or "contractive" in kind, name
    cited = {name for row in sources.splitlines() if row.startswith("| `") for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert cited == set(CODECS) - {"identity"}

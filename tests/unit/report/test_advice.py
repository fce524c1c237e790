"""Advice names the cause, and never what was done already."""

import pytest

from mqat.report.advice import hint
from tests.unit.report.entries import entry

NOTHING = {"recipes": {}, "calibrator": "percentile", "is_trained": False}


def done(**recipe):
    return NOTHING | {"recipes": {"a": recipe}}


def test_a_clear_output_needs_none():
    assert hint(entry("a", 30.0)) == "" and hint(entry("a", None)) == ""


OUTLIER = entry("a", 10.0, outliers=1)
COARSE = entry("a", 10.0, weight=11.0, input=None, group=128)


@pytest.mark.parametrize(
    ("linear", "about", "advice"),
    [
        (OUTLIER, NOTHING, "outlier channels: smoothquant: true"),
        (OUTLIER, done(smoothquant=True), "outlier channels: inputs per token"),
        (
            entry("a", 10.0, outliers=1, input="int8_full per token"),
            done(smoothquant=True),
            'outlier channels: its input left out (disabled: ["a.input"])',
        ),
        (entry("a", 10.0, clip=0.5), NOTHING, "inputs are clipped: calibrator: max"),
        (
            entry("a", 10.0, clip=0.5),
            NOTHING | {"calibrator": "max"},
            "inputs are clipped: more calibration text",
        ),
        (COARSE, NOTHING, "the weight is the cause: weight_calibrator: awq"),
        (COARSE, done(weight_calibrator="awq"), "the weight is the cause: rounding: gptq"),
        (
            COARSE,
            done(weight_calibrator="awq", rounding="gptq"),
            "the weight is the cause: groups of 64 (group_size)",
        ),
        (
            entry("a", 10.0, weight=11.0, input=None, group=32),
            done(weight_calibrator="awq", rounding="gptq"),
            "the weight is the cause: train it (QAT)",
        ),
        # After training, calibration is no advice any more.
        (COARSE, NOTHING | {"is_trained": True}, "the weight is the cause: groups of 64"),
        (
            entry("a", 10.0, weight=11.0, input=None, group=32),
            NOTHING | {"is_trained": True},
            "the weight is the cause: a rule with more bits",
        ),
        (entry("a", 10.0), NOTHING, "a rule with more bits for this linear"),
    ],
)
def test_the_first_step_that_is_open_is_named(linear, about, advice):
    assert hint(linear, about).startswith(advice)


def test_what_is_not_known_is_said_so():
    said = hint(OUTLIER)
    assert "smoothquant: true, if that was not done yet; else inputs per token" in said
    said = hint(COARSE, {"recipes": None})
    assert "weight_calibrator: awq or rounding: gptq, if that was not done yet; else groups" in said

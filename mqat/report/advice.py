"""What to try for a linear whose output is noisy, given what has been done to it already."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

LOW_DB = 20.0  # below this, a tenth of the output's amplitude is noise
_SMALLEST_GROUP = 32  # that servers have kernels for
_CLIPPED = 0.01  # share of an input's elements


def decibel(value: float | None) -> float:
    """A figure of the report as a number that can be compared; None there: exact."""
    return math.inf if value is None else value


def hint(entry: Mapping[str, Any], about: Mapping[str, Any] | None = None) -> str:
    """What to try next; empty where the output is clear.

    Args:
        entry: Of `linears` in the quality report.
        about: The report's own `about`: `recipes` (name -> what was done to the weight and input
            before scales were frozen), `calibrator`, `is_trained`. A key that is missing or None is
            not known, and the advice says so.
    """
    about, value = about or {}, entry["output_sqnr_db"]
    if value is None or value >= LOW_DB:
        return ""
    recipes = about.get("recipes")
    recipe = None if recipes is None else recipes.get(entry["name"], {})
    operand, weight = entry["input"], entry["weight"]
    if operand is not None and entry["outliers"]["count"]:
        return f"outlier channels: {_for_outliers(entry, recipe)}"
    if operand is not None and operand["clip_rate"] > _CLIPPED:
        calibrator = about.get("calibrator")
        known = None if calibrator is None else calibrator == "max"
        return "inputs are clipped: " + _first_open(
            [(known, "calibrator: max"), (False, "more calibration text (num_calib_size)")]
        )
    if weight is not None and decibel(weight["sqnr_db"]) < value + 3:
        return f"the weight is the cause: {_for_weight(weight, recipe, about.get('is_trained'))}"
    return "a rule with more bits for this linear"


def _for_outliers(entry: Mapping[str, Any], recipe: Mapping[str, Any] | None) -> str:
    is_per_token = "token" in entry["input"]["format"] or "group" in entry["input"]["format"]
    return _first_open(
        [
            (_done(recipe, "smoothquant", False), "smoothquant: true"),
            (is_per_token, "inputs per token (an algorithm with _pc_pt)"),
            (False, f'its input left out (disabled: ["{entry["name"]}.input"])'),
        ]
    )


def _for_weight(
    weight: Mapping[str, Any], recipe: Mapping[str, Any] | None, is_trained: bool | None
) -> str:
    size = int(weight["format"].partition("group:")[2] or 0)
    smaller = max(size // 2, _SMALLEST_GROUP)
    is_integer = "int" in weight["format"]
    steps = [
        (not is_integer or _done(recipe, "weight_calibrator", "max"), "weight_calibrator: awq"),
        (not is_integer or _done(recipe, "rounding", "nearest"), "rounding: gptq"),
        (size <= _SMALLEST_GROUP or not is_integer, f"groups of {smaller} (group_size)"),
        (is_trained, "train it (QAT)"),
        (False, "a rule with more bits"),
    ]
    if is_trained:  # calibration is over: what it could have done is no advice for this model
        steps = steps[2:]
    return _first_open(steps)


def _done(recipe: Mapping[str, Any] | None, key: str, default: Any) -> bool | None:
    """Whether a recipe does more than nothing for a key; None: the recipe is not known."""
    return None if recipe is None else recipe.get(key, default) != default


def _first_open(steps: Sequence[tuple[bool | None, str]]) -> str:
    """The first step that was not done; those of which it is not known are named with that doubt."""
    unsure = []
    for is_done, text in steps:
        if is_done is None:
            unsure.append(text)
        elif not is_done:
            doubt = f"{' or '.join(unsure)}, if that was not done yet; else " if unsure else ""
            return doubt + text
    raise AssertionError("the last step is always open")

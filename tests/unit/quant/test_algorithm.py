"""What the named algorithms mean, and what recipes refuse."""

from dataclasses import replace

import pytest
import torch

from mqat.quant.algorithm import ALGORITHMS, Algorithm, Recipe, named_algorithm, named_scheme
from mqat.quant.formats import (
    FP4_E2M1,
    FP8_E4M3,
    INT4,
    INT4_AMAX7_5,
    INT8,
    INT8_AMAX128,
    INT8_MIN128,
    NF4,
    UINT4,
)
from mqat.quant.granularity import PerChannel, PerGroup, PerTensor, PerToken
from mqat.quant.scheme import LinearScheme, TensorScheme

BF16 = torch.bfloat16
STATIC_FP8 = TensorScheme(FP8_E4M3, PerTensor(), BF16)
STATIC_INT8 = TensorScheme(INT8_MIN128, PerTensor(), torch.float32)


def blocks(fmt, size: int, scale: torch.dtype, **more) -> tuple[TensorScheme, TensorScheme]:
    """Frozen for the weight, dynamic for the input."""
    weight = TensorScheme(fmt, PerGroup(size), scale, **more)
    return weight, replace(weight, is_dynamic=True)


MEANING = {
    "int8": (TensorScheme(INT8, PerChannel(), torch.float32), STATIC_INT8),
    "int8_pc_pt": (
        TensorScheme(INT8, PerChannel()),
        TensorScheme(INT8_MIN128, PerToken(), is_dynamic=True),
    ),
    "int8_wo": (TensorScheme(INT8_AMAX128, PerChannel(), torch.float32), None),
    "int4": (TensorScheme(INT4, PerGroup(128), BF16), None),
    "int4_w_int8_a": (TensorScheme(INT4, PerGroup(128), BF16), STATIC_INT8),
    "fp8": (STATIC_FP8, STATIC_FP8),
    "int8_sq": (TensorScheme(INT8, PerChannel()), STATIC_INT8),
    "int4_awq": (TensorScheme(INT4, PerGroup(128), BF16), None),
    "w4a8_awq": (TensorScheme(INT4, PerGroup(128), BF16), STATIC_FP8),
    "fp8_pc_pt": (
        TensorScheme(FP8_E4M3, PerChannel()),
        TensorScheme(FP8_E4M3, PerToken(), is_dynamic=True),
    ),
    "8da4w": (
        TensorScheme(INT4_AMAX7_5, PerGroup(256)),
        TensorScheme(INT8_MIN128, PerToken(), is_dynamic=True, is_asymmetric=True),
    ),
    "w_int4_sym": (TensorScheme(INT4_AMAX7_5, PerGroup(128), BF16), None),
    "w_uint4_asym": (TensorScheme(UINT4, PerGroup(128), BF16, is_asymmetric=True), None),
    "nvfp4": blocks(FP4_E2M1, 16, torch.float8_e4m3fn),
    "mxfp4": blocks(FP4_E2M1, 32, torch.float8_e8m0fnu, exponent="nearest"),
    "mxfp8": blocks(FP8_E4M3, 32, torch.float8_e8m0fnu),
    "nf4": (TensorScheme(NF4, PerGroup(64)), None),
}


def test_every_algorithm_but_null_has_a_meaning_here():
    assert {*MEANING, "null"} == set(ALGORITHMS)
    assert named_scheme("null") is None


@pytest.mark.parametrize("algorithm", MEANING)
def test_named_algorithms_mean_what_the_table_says(algorithm):
    assert named_scheme(algorithm) == LinearScheme(algorithm, *MEANING[algorithm])


@pytest.mark.parametrize(
    "algorithm", ["int4", "int4_w_int8_a", "int4_awq", "w4a8_awq", "8da4w", "w_uint4_asym"]
)
def test_the_group_size_is_chosen_by_the_caller(algorithm):
    weight, usual = named_scheme(algorithm, group_size=64).weight, named_scheme(algorithm).weight
    assert weight == replace(usual, granularity=PerGroup(64)) != usual


def test_unknown_algorithms_suggest_the_nearest():
    with pytest.raises(ValueError, match=r"did you mean 'int8_wo'\?"):
        named_scheme("int8_w")
    with pytest.raises(ValueError, match=r"'zzz' is unknown; known: int8, int8_sq"):
        named_scheme("zzz")


AWQ = Recipe(smoothquant=True, sq_alpha=None, sq_grid="float", weight_calibrator="awq")
RECIPES = {"int8_sq": Recipe(smoothquant=True), "int4_awq": AWQ, "w4a8_awq": AWQ}


@pytest.mark.parametrize("algorithm", MEANING)
def test_named_algorithms_promise_the_recipe_of_the_table(algorithm):
    expected = Algorithm(named_scheme(algorithm), RECIPES.get(algorithm, Recipe()))
    assert named_algorithm(algorithm) == expected


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"weight_calibrator": "mss"},
            r"there\.weight_calibrator='mss' is unknown; did you mean 'mse'",
        ),
        ({"sq_grid": "floats"}, "sq_grid='floats' is unknown; did you mean 'float'"),
        ({"rounding": "up"}, "rounding='up' is unknown; known: nearest, gptq"),
        ({"sq_alpha": 1.5}, r"sq_alpha=1\.5 must be in \[0, 1\], or null"),
        ({"sq_alpha": "half"}, r"config: there\..*str"),
        ({"smoothquant": "maybe"}, "smoothquant='maybe' must be true or false"),
        ({"search_steps": 0}, "search_steps=0 must be at least 1"),
        ({"smooth": True}, r"unknown key 'there\.smooth'; did you mean 'smoothquant'"),
    ],
)
def test_a_recipe_refuses_unknown_keys_and_values_by_name(keys, message):
    with pytest.raises(ValueError, match=message):
        Recipe().with_keys(keys, "there")

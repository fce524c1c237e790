import json
import math
from dataclasses import replace

import pytest
import torch

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
from mqat.quant.granularity import PerBlock, PerChannel, PerGroup, PerTensor, PerToken
from mqat.quant.scheme import ALGORITHMS, LinearScheme, TensorScheme, named_scheme

BF16 = torch.bfloat16
STATIC_FP8 = TensorScheme(FP8_E4M3, PerTensor(), BF16)
STATIC_INT8 = TensorScheme(INT8_MIN128, PerTensor(), torch.float32)


def blocks(fmt, size: int, scale: torch.dtype) -> tuple[TensorScheme, TensorScheme]:
    """Frozen for the weight, dynamic for the input."""
    weight = TensorScheme(fmt, PerGroup(size), scale)
    return weight, TensorScheme(fmt, PerGroup(size), scale, is_dynamic=True)


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
    "mxfp4": blocks(FP4_E2M1, 32, torch.float8_e8m0fnu),
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


@pytest.mark.parametrize("algorithm", MEANING)
def test_schemes_survive_json(algorithm):
    scheme = named_scheme(algorithm)
    assert LinearScheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme


def test_unknown_algorithms_suggest_the_nearest():
    with pytest.raises(ValueError, match=r"did you mean 'int8_wo'\?"):
        named_scheme("int8_w")
    with pytest.raises(ValueError, match=r"'zzz' is unknown; known: int8, int8_sq"):
        named_scheme("zzz")


@pytest.mark.parametrize(
    ("key", "value"),
    [("format", "int9"), ("granularity", "row"), ("scale_dtype", "load"), ("scale_dtype", "int8")],
)
def test_a_damaged_description_is_refused(key, value):
    values = named_scheme("int8").weight.to_dict() | {key: value}
    with pytest.raises(ValueError, match=f"'{value}'"):
        TensorScheme.from_dict(values)


def test_descriptions_of_older_checkpoints_are_read_and_written_as_they_were():
    values = named_scheme("int8").to_dict()
    assert values.keys() == {"name", "weight", "input"}
    assert values["weight"].keys() == {"format", "granularity", "scale_dtype"}


def test_outputs_survive_json():
    scheme = LinearScheme("custom", None, None, STATIC_INT8)
    assert LinearScheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((UINT4, PerChannel()), "'uint4' has no negative codes: set asymmetric, or use 'int4'"),
        ((FP8_E4M3, PerChannel(), BF16, False, True), "asymmetric needs an integer format"),
        ((INT4, PerGroup(32), torch.float8_e8m0fnu, False, True), "asymmetric needs an integer"),
        ((FP4_E2M1, PerChannel(), torch.float8_e4m3fn), "needs granularity 'group:<size>'"),
        ((INT8, PerToken()), "set dynamic"),
        ((INT8, PerTensor(), BF16, True), "dynamic scales need granularity 'token' or"),
        ((INT8, PerBlock(128), BF16, True), "dynamic scales need granularity 'token' or"),
    ],
)
def test_combinations_without_a_meaning_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TensorScheme(*arguments)


@pytest.mark.parametrize(
    ("operands", "message"),
    [
        ((MEANING["mxfp8"][1], None), "weight: dynamic scales are for inputs"),
        ((None, TensorScheme(INT8, PerGroup(32))), "input: static scales have granularity"),
        ((None, None, MEANING["mxfp8"][1]), "output: granularity must be"),
    ],
)
def test_operands_that_cannot_be_quantized_that_way_are_refused(operands, message):
    with pytest.raises(ValueError, match=message):
        LinearScheme("custom", *operands)


def test_checkpoints_hold_what_is_frozen_and_nothing_of_dynamic_scales():
    shapes = {
        name: {
            kind: operand.frozen_shapes((6, 256) if kind == "weight" else None)
            for kind, operand in named_scheme(name).operands.items()
        }
        for name in ("nvfp4", "8da4w", "w_uint4_asym")
    }
    assert shapes["nvfp4"] == {
        "weight": {"scale": (6, 16), "global_scale": (1,)},
        "input": {"global_scale": (1,)},
    }
    assert shapes["8da4w"] == {"weight": {"scale": (6, 1)}, "input": {}}
    assert shapes["w_uint4_asym"]["weight"] == {"scale": (6, 2), "zero_point": (6, 2)}


def test_gradients_reach_as_far_as_scales_follow():
    assert named_scheme("mxfp4").input.ste_clip_range == math.inf
    assert (
        named_scheme("mxfp4").weight.ste_clip_range
        == named_scheme("nvfp4").weight.ste_clip_range
        == 8.0
    )
    assert named_scheme("mxfp8").weight.ste_clip_range == 512.0
    assert named_scheme("int8").weight.ste_clip_range is None

import json
import math

import pytest
import torch

from mqat.quant.algorithm import ALGORITHMS, named_scheme
from mqat.quant.formats import (
    FP4_E2M1,
    FP8_E4M3,
    INT4,
    INT8,
    INT8_MIN128,
    UINT4,
)
from mqat.quant.granularity import PerBlock, PerChannel, PerGroup, PerTensor, PerToken
from mqat.quant.scheme import LinearScheme, TensorScheme

BF16 = torch.bfloat16
STATIC_INT8 = TensorScheme(INT8_MIN128, PerTensor(), torch.float32)
DYNAMIC_MX = TensorScheme(FP8_E4M3, PerGroup(32), torch.float8_e8m0fnu, is_dynamic=True)


@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name != "null"])
def test_schemes_survive_json(algorithm):
    scheme = named_scheme(algorithm)
    assert LinearScheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme


def test_a_checkpoint_from_before_exponents_keeps_the_rule_it_was_made_with():
    written = named_scheme("mxfp4").to_dict()
    older = {
        kind: {key: value for key, value in written[kind].items() if key != "exponent"}
        for kind in ("weight", "input")
    }
    found = LinearScheme.from_dict(written | older)
    assert found.weight.exponent == found.input.exponent == "floor"
    assert named_scheme("mxfp4").weight.exponent == "nearest"  # control: now it is another


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
        ((DYNAMIC_MX, None), "weight: dynamic scales are for inputs"),
        ((None, TensorScheme(INT8, PerGroup(32))), "input: static scales have granularity"),
        ((None, None, DYNAMIC_MX), "output: granularity must be"),
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

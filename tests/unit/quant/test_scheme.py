import json

import pytest
import torch

from mqat.quant.formats import FP8_E4M3, INT4, INT8, INT8_FULL, INT8_LOADER
from mqat.quant.granularity import PerChannel, PerGroup, PerTensor
from mqat.quant.scheme import ALGORITHMS, LinearScheme, TensorScheme, named_scheme

BF16 = torch.bfloat16
STATIC_INT8 = TensorScheme(INT8_FULL, PerTensor(), torch.float32)
MEANING = {
    "int8": (TensorScheme(INT8, PerChannel(), torch.float32), STATIC_INT8),
    "int8_wo": (TensorScheme(INT8_LOADER, PerChannel(), torch.float32), None),
    "int4": (TensorScheme(INT4, PerGroup(128), BF16), None),
    "int4_w_int8_a": (TensorScheme(INT4, PerGroup(128), BF16), STATIC_INT8),
    "fp8": (TensorScheme(FP8_E4M3, PerTensor(), BF16), TensorScheme(FP8_E4M3, PerTensor(), BF16)),
}


def test_every_algorithm_but_null_has_a_meaning_here():
    assert {*MEANING, "null"} == set(ALGORITHMS)
    assert named_scheme("null") is None


@pytest.mark.parametrize("algorithm", MEANING)
def test_named_algorithms_mean_what_the_table_says(algorithm):
    assert named_scheme(algorithm) == LinearScheme(algorithm, *MEANING[algorithm])


@pytest.mark.parametrize("algorithm", ["int4", "int4_w_int8_a"])
def test_the_group_size_is_chosen_by_the_caller(algorithm):
    assert named_scheme(algorithm, group_size=64).weight.granularity == PerGroup(64)


@pytest.mark.parametrize("algorithm", MEANING)
def test_schemes_survive_json(algorithm):
    scheme = named_scheme(algorithm)
    assert LinearScheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme


def test_unknown_algorithms_suggest_the_nearest():
    with pytest.raises(ValueError, match=r"did you mean 'int8_wo'\? Known: int8, int8_wo"):
        named_scheme("int8_w")
    with pytest.raises(ValueError, match=r"'zzz' is unknown\. Known: "):
        named_scheme("zzz")


@pytest.mark.parametrize(
    ("key", "value"),
    [("format", "int5"), ("granularity", "row"), ("scale_dtype", "load"), ("scale_dtype", "int8")],
)
def test_a_damaged_description_is_refused(key, value):
    values = named_scheme("int8").weight.to_dict() | {key: value}
    with pytest.raises(ValueError, match=f"'{value}'"):
        TensorScheme.from_dict(values)

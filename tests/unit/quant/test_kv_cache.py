import pytest
import torch

from mqat.models.schemes import kv_cache_schemes, linear_schemes, scheme_from_dict, table_schemes
from mqat.quant.algorithm import named_scheme
from mqat.quant.kv_cache import kv_cache_scheme
from mqat.quant.quantizer import Quantizer


@pytest.mark.parametrize("scales", ["shared", "separate"])
@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_schemes_survive_json(name, scales):
    scheme = kv_cache_scheme(name, scales)
    assert scheme_from_dict(scheme.to_dict()) == scheme
    assert list(scheme.operands) == (["kv"] if scales == "shared" else ["key", "value"])
    assert [scheme.scale_of(kind) in scheme.operands for kind in ("key", "value")] == [True, True]
    linear = named_scheme("int8")
    assert scheme_from_dict(linear.to_dict()) == linear
    every = {"decoder.layers.0.a": linear, "decoder.layers.0.b": scheme, "output_layer": linear}
    assert linear_schemes(every) == {"decoder.layers.0.a": linear}
    assert kv_cache_schemes(every) == {"decoder.layers.0.b": scheme}
    assert table_schemes(every) == {"output_layer": linear}


def test_unknown_words_suggest_the_nearest():
    with pytest.raises(ValueError, match=r"quantization.kv_cache='int4' is unknown; did you mean"):
        kv_cache_scheme("int4")
    with pytest.raises(ValueError, match="did you mean 'separate'"):
        kv_cache_scheme("fp8", "seperate")


def frozen(name, amax):
    quantizer = Quantizer(kv_cache_scheme(name).tensor, None, "x.kv")
    quantizer.freeze_(torch.tensor([amax]))
    return quantizer


def test_int8_saturates_at_minus_128_and_rounds_half_to_even():
    quantizer = frozen("int8", 127 * 0.5)  # step 0.5
    x = torch.tensor([0.2, 0.25, 0.75, -0.75, 100.0, -100.0])
    assert quantizer.scale.item() == 0.5
    assert quantizer(x).tolist() == [0.0, 0.0, 1.0, -1.0, 63.5, -64.0]


def test_fp8_has_eight_levels_an_octave_and_saturates_at_448_steps():
    quantizer = frozen("fp8", 448 * 0.25)  # step 0.25
    # In steps: 17 lies between 16 and 18, ties to the even mantissa (16); 1000 saturates.
    x = torch.tensor([17.0, 19.0, 2.0**-10, 1000.0, -1000.0]) * 0.25
    assert quantizer.scale.item() == 0.25
    assert (quantizer(x) / 0.25).tolist() == [16.0, 20.0, 0.0, 448.0, -448.0]


def test_fp8_steps_are_numbers_of_bfloat16_that_clip_nothing():
    quantizer = frozen("fp8", 5.0)
    scale = quantizer.scale
    assert torch.equal(scale.bfloat16().float(), scale) and 448 * scale.item() >= 5.0

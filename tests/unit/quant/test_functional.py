import pytest
import torch

from mqat.quant.formats import FP8_E4M3, INT4, INT8, INT8_FULL
from mqat.quant.functional import (
    compute_amax,
    compute_scale,
    dequantize,
    fake_quantize,
    quantize,
)
from mqat.quant.granularity import PerChannel, PerGroup, PerTensor
from mqat.quant.observers import ActivationObserver
from mqat.quant.packing import pack_int4, unpack_int4
from mqat.quant.scheme import ALGORITHMS, LinearScheme, named_scheme


def test_int8_codes_match_a_hand_computed_row():
    x = torch.tensor([[-1.27, 0.005, 0.015, 0.6, 1.27]])
    scale = compute_scale(compute_amax(x, PerChannel()), INT8)
    assert torch.allclose(scale, torch.tensor([0.01]))
    assert quantize(x, torch.tensor([0.01]), INT8, PerChannel())[0, -1] == 127
    assert quantize(x, torch.tensor([0.01]), INT8, PerChannel())[0, 3] == 60


def test_activations_may_use_the_code_minus_128_and_weights_may_not():
    x, scale = torch.tensor([[-5.0]]), torch.tensor([0.01])
    assert quantize(x, scale, INT8_FULL, PerTensor()).item() == -128
    assert quantize(x, scale, INT8, PerTensor()).item() == -127


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("fmt", "granularity"),
    [(INT8, PerChannel()), (INT4, PerGroup(64)), (INT4, PerGroup(48)), (FP8_E4M3, PerTensor())],
)
def test_fake_quantize_equals_dequantized_codes_bit_for_bit(fmt, granularity, dtype):
    x = torch.randn(8, 160, generator=torch.Generator().manual_seed(0)).to(dtype)
    scale = compute_scale(compute_amax(x, granularity), fmt)
    served = dequantize(quantize(x, scale, fmt, granularity), scale, granularity, dtype)
    assert torch.equal(fake_quantize(x, scale, fmt, granularity), served)


def test_fp8_codes_are_torchs_own_cast():
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)) * 100
    scale = torch.tensor([0.5])
    expected = (x / 0.5).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(
        quantize(x, scale, FP8_E4M3, PerTensor()).view(torch.uint8), expected.view(torch.uint8)
    )


def test_gradient_is_zero_exactly_where_values_are_clipped():
    x = torch.tensor([[-2.0, -1.27, 0.3, 1.2749, 1.3]], requires_grad=True)
    fake_quantize(x, torch.tensor([0.01]), INT8, PerTensor()).sum().backward()
    assert x.grad.tolist() == [[0.0, 1.0, 1.0, 1.0, 0.0]]


def test_a_short_last_group_has_its_own_scale():
    x = torch.tensor([[1.0, 2.0, 3.0, 40.0, 5.0]])
    assert compute_amax(x, PerGroup(2)).tolist() == [[2.0, 40.0, 5.0]]


def test_bf16_scales_are_rounded_up_and_exact():
    scale = compute_scale(torch.rand(1000) + 0.1, INT4, scale_dtype=torch.bfloat16)
    exact = compute_scale(torch.rand(1000) + 0.1, INT4)
    assert torch.equal(scale.bfloat16().float(), scale)
    assert not torch.equal(exact.bfloat16().float(), exact)  # control: rounding did something


def test_packing_puts_even_rows_in_the_low_nibble():
    codes = torch.tensor([[1, -8], [-1, 7]], dtype=torch.int8)
    assert pack_int4(codes).view(torch.uint8).tolist() == [[0xF1, 0x78]]
    everything = torch.arange(-8, 8, dtype=torch.int8).repeat(4, 1)
    assert torch.equal(unpack_int4(pack_int4(everything)), everything)
    with pytest.raises(ValueError, match="even number of rows"):
        pack_int4(codes[:1])


def test_histograms_of_parts_add_up_to_the_histogram_of_the_whole():
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(2))
    whole, first, second = (ActivationObserver("percentile") for _ in range(3))
    whole.observe_(x)
    first.observe_(x[:3000])
    second.observe_(x[3000:])
    assert torch.equal(whole.histogram, first.histogram + second.histogram)
    exact = x.abs().kthvalue(9900).values
    assert exact <= whole.amax(99.0) <= exact * (1 + 1 / 64)
    assert whole.amax(None) == x.abs().max()


def test_observer_names_the_layer_that_saw_nothing_or_nan():
    observer = ActivationObserver()
    with pytest.raises(ValueError, match=r"layer\.7: no calibration token"):
        observer.check("layer.7")
    observer.observe_(torch.tensor([1.0, float("nan")]))
    with pytest.raises(ValueError, match=r"layer\.7: input holds NaN"):
        observer.check("layer.7")


def test_schemes_survive_json_and_unknown_names_suggest_the_nearest():
    for name in ALGORITHMS:
        scheme = named_scheme(name)
        assert scheme is None or LinearScheme.from_dict(scheme.to_dict()) == scheme
    with pytest.raises(ValueError, match="did you mean 'int8_wo'"):
        named_scheme("int8_w")

import numpy as np
import pytest
import torch
from torch import Tensor

from mqat.quant.formats import (
    FORMATS,
    FP4_E2M1,
    FP8_E4M3,
    FP8_E5M2,
    INT2_ELASTIC,
    INT4,
    INT4_AMAX7_5,
    INT8,
    INT8_AMAX128,
    INT8_MIN128,
    NF4,
    TERNARY,
    UINT4,
)
from mqat.quant.functional import (
    dequantize,
    fake_quantize,
    quantize,
)
from mqat.quant.granularity import PerBlock, PerChannel, PerGroup, PerTensor, PerToken
from mqat.quant.scales import compute_affine, compute_amax, compute_range, compute_scale
from mqat.quant.scheme import TensorScheme

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def label(value: object) -> str:
    """Test ids: formats by their name."""
    return str(getattr(value, "name", value))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Stricter than `torch.equal`, for which 0.0 and -0.0 are the same."""
    kind = BITS[a.dtype]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def test_int8_codes_match_a_hand_computed_row():
    x = torch.tensor([[-1.27, 0.004, 0.6, 1.27]])
    scale = compute_scale(compute_amax(x, PerChannel()), INT8)
    assert torch.allclose(scale, torch.tensor([0.01]))
    assert quantize(x, scale, INT8, PerChannel()).tolist() == [[-127, 0, 60, 127]]


def test_halves_are_rounded_to_even_codes():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5]) * 0.25
    codes = quantize(x, torch.tensor([0.25]), INT8, PerTensor())
    assert codes.tolist() == [0, 2, 2, 0, -2, -2]


def test_activations_may_use_the_code_minus_128_and_weights_may_not():
    x, scale = torch.tensor([[-5.0]]), torch.tensor([0.01])
    assert quantize(x, scale, INT8_MIN128, PerTensor()).item() == -128
    assert quantize(x, scale, INT8, PerTensor()).item() == -127
    assert quantize(x, scale, INT4, PerTensor()).item() == -8


def test_the_loaders_grid_divides_by_128_and_saturates_its_positive_end():
    x = torch.tensor([[-2.0, 1.0, 2.0]])
    scale = compute_scale(compute_amax(x, PerChannel()), INT8_AMAX128)
    assert scale.tolist() == [2.0 / 128]
    assert quantize(x, scale, INT8_AMAX128, PerChannel()).tolist() == [[-128, 64, 127]]


@pytest.mark.parametrize("fmt", [INT8, INT8_MIN128, INT8_AMAX128, INT4])
@pytest.mark.parametrize("size", [16, 48])  # 48 leaves a last group of 16 in a row of 160
def test_integer_codes_equal_an_independent_numpy_version(fmt, size):
    x = randn(8, 160)
    scale = compute_scale(compute_amax(x, PerGroup(size)), fmt) * 0.7  # 0.7: some values clip
    steps = np.repeat(scale.numpy(), size, axis=1)[:, :160]
    expected = np.clip(np.rint(x.numpy() / steps), fmt.qmin, fmt.qmax).astype(np.int8)
    assert quantize(x, scale, fmt, PerGroup(size)).numpy().tobytes() == expected.tobytes()


def test_fp8_codes_are_torchs_own_cast_of_the_clamped_ratio():
    x, scale = randn(4, 64, seed=1) * 100, torch.tensor([0.3])
    expected = (x / 0.3).clamp(-448, 448).to(torch.float8_e4m3fn)
    codes = quantize(x, scale, FP8_E4M3, PerTensor())
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
    assert (x / 0.3).abs().max() > 448  # control: the clamp had something to do


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=label)
def test_every_code_is_a_fixed_point(fmt):
    if fmt.levels:
        codes = torch.arange(len(fmt.levels), dtype=torch.uint8)
    elif fmt.is_float:
        codes = torch.arange(256, dtype=torch.uint8).view(fmt.storage_dtype)
        codes = codes[codes.float().isfinite()]
    else:
        codes = torch.arange(int(fmt.qmin), int(fmt.qmax) + 1).to(fmt.storage_dtype)
    for step in (0.01, 1 / 3, 7.0):
        scale = torch.tensor([step])
        values = dequantize(codes, scale, PerTensor(), torch.float32, fmt=fmt)
        again = quantize(values, scale, fmt, PerTensor())
        assert torch.equal(again.view(torch.uint8), codes.view(torch.uint8))


@pytest.mark.parametrize("dtype", BITS, ids=label)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=label)
@pytest.mark.parametrize(
    ("fmt", "granularity"),
    [
        (INT8, PerChannel()),
        (INT8_MIN128, PerTensor()),
        (INT8_AMAX128, PerChannel()),
        (INT4, PerGroup(32)),
        (INT4, PerGroup(48)),
        (FP8_E4M3, PerTensor()),
        (FP8_E4M3, PerToken()),
        (FP8_E5M2, PerBlock(64)),
        (INT4_AMAX7_5, PerGroup(48)),
        (FP4_E2M1, PerGroup(16)),
        (NF4, PerGroup(64)),
    ],
    ids=label,
)
def test_fake_quantize_equals_dequantized_codes_bit_for_bit(fmt, granularity, dtype, scale_dtype):
    x = randn(8, 160).to(dtype)
    scale = compute_scale(compute_amax(x, granularity), fmt, scale_dtype=scale_dtype) * 0.75
    codes = quantize(x, scale, fmt, granularity)
    served = dequantize(codes, scale, granularity, dtype, fmt=fmt)
    trained = fake_quantize(x.clone().requires_grad_(), scale, fmt, granularity)
    assert same_bits(trained.detach(), served)
    assert same_bits(fake_quantize(x, scale, fmt, granularity), served)
    with torch.no_grad():
        assert same_bits(fake_quantize(trained, scale, fmt, granularity), served)  # a fixed point
    assert not torch.equal(x, served)  # control: quantization changed something


def test_small_negative_values_become_the_zero_that_codes_can_hold():
    x = torch.tensor([-0.001], requires_grad=True)
    result = fake_quantize(x, torch.tensor([0.01]), INT8, PerTensor())
    assert same_bits(result.detach(), torch.tensor([0.0]))
    assert not same_bits(torch.tensor([-0.0]), torch.tensor([0.0]))  # control of same_bits


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), PerGroup(2), PerGroup(5)])
def test_layout_in_memory_does_not_matter(granularity):
    for x in (randn(6, 256).t(), randn(8, 300)[:, 7:135]):
        scale = compute_scale(compute_amax(x, granularity), INT8)
        plain, strided = x.contiguous().requires_grad_(), x.detach().requires_grad_()
        expected = fake_quantize(plain, scale * 0.5, INT8, granularity)
        result = fake_quantize(strided, scale * 0.5, INT8, granularity)
        assert torch.equal(result, expected)
        result.sum().backward()
        expected.sum().backward()
        assert torch.equal(strided.grad, plain.grad)


def test_inputs_are_left_as_they_were():
    for requires_grad in (False, True):
        x, scale = randn(4, 8).requires_grad_(requires_grad), torch.tensor([0.1])
        before = x.detach().clone()
        fake_quantize(x, scale, INT8, PerTensor())
        quantize(x, scale, INT8, PerTensor())
        assert torch.equal(x.detach(), before) and scale.tolist() == torch.tensor([0.1]).tolist()


def test_gradient_is_zero_exactly_where_values_are_clipped():
    x = torch.tensor([[-2.0, -1.27, 0.3, 1.2749, 1.3]], requires_grad=True)
    fake_quantize(x, torch.tensor([0.01]), INT8, PerTensor()).sum().backward()
    assert x.grad.tolist() == [[0.0, 1.0, 1.0, 1.0, 0.0]]


@pytest.mark.parametrize(
    ("fmt", "low", "high"),
    [(INT8, -127.5, 127.5), (INT8_MIN128, -128.5, 127.5), (INT4, -8.5, 7.5), (FP8_E4M3, -448, 448)],
    ids=label,
)
def test_the_border_of_clipping_belongs_to_the_inside(fmt, low, high):
    border = torch.tensor([low, high], dtype=torch.float32)
    beyond = torch.nextafter(border, border * 2)
    x = torch.cat([border, beyond]).requires_grad_()
    grad = torch.tensor([1.0, -2.0, 3.0, -4.0])
    fake_quantize(x, torch.tensor([1.0]), fmt, PerTensor()).backward(grad)
    assert x.grad.tolist() == [1.0, -2.0, 0.0, 0.0]


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=label)
def test_nan_stays_visible_and_gets_no_gradient(fmt):
    x = torch.tensor([float("nan"), 1.0], requires_grad=True)
    result = fake_quantize(x, torch.tensor([1.0]), fmt, PerTensor())
    result[1].backward()
    assert result.isnan().tolist() == [True, False]
    assert x.grad.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("granularity", [PerChannel(), PerGroup(32), PerGroup(48)], ids=label)
def test_backward_keeps_one_byte_per_element_and_nothing_without_gradient(granularity):
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = randn(8, 160).requires_grad_()
    scale = compute_scale(compute_amax(x, granularity), INT4)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        fake_quantize(x, scale, INT4, granularity)
        assert [(t.dtype, t.numel()) for t in saved] == [(torch.bool, x.numel())]
        with torch.no_grad():
            assert not fake_quantize(x, scale, INT4, granularity).requires_grad
        fake_quantize(x.detach(), scale, INT4, granularity)
    assert len(saved) == 1


def test_values_and_gradients_equal_torchs_fake_quantize_where_its_inverse_scale_is_exact():
    x, scale = randn(16, 64).requires_grad_(), 2.0 ** torch.arange(-8, 0).repeat(2).float()
    theirs_x = x.detach().clone().requires_grad_()
    ours = fake_quantize(x, scale, INT8, PerChannel())
    theirs = torch.fake_quantize_per_channel_affine(
        theirs_x, scale, torch.zeros(16, dtype=torch.int32), 0, -127, 127
    )
    assert torch.equal(ours, theirs)
    grad = randn(16, 64, seed=1)
    ours.backward(grad)
    theirs.backward(grad)
    assert torch.equal(x.grad, theirs_x.grad)
    assert 0 < (x.grad == 0).sum() < x.numel()  # control: some clip, some do not


def test_all_zero_groups_stay_zero():
    x = torch.zeros(2, 8)
    for fmt in FORMATS.values():
        if fmt == INT2_ELASTIC:  # has no zero: half of the smallest step
            continue
        scale = compute_scale(compute_amax(x, PerChannel()), fmt)
        assert scale.tolist() == [2.0**-126] * 2
        assert same_bits(fake_quantize(x, scale, fmt, PerChannel()), x)


def test_bfloat16_scales_round_up_by_hand():
    # bfloat16 has 8 significant bits: 1/3 = 0.0101010101|01.. in binary lies between 85/256 and 86/256.
    amax = torch.tensor([7 / 3, 7.0, 7 * 2.0**-9])
    scale = compute_scale(amax, INT4, scale_dtype=torch.bfloat16)
    assert scale.tolist() == [171 / 512, 1.0, 2.0**-9]


def test_bfloat16_scales_are_exact_in_bfloat16_and_float16_and_clip_nothing():
    amax = torch.logspace(-5, 4, 5000)
    exact = compute_scale(amax, INT4)
    scale = compute_scale(amax, INT4, scale_dtype=torch.bfloat16)
    assert torch.equal(scale.bfloat16().float(), scale)
    assert torch.equal(scale.half().float(), scale)
    assert (scale >= exact).all()
    above = scale - exact
    assert (above <= torch.maximum(exact / 128, torch.tensor(2.0**-24))).all()  # one grid step
    assert not torch.equal(exact.bfloat16().float(), exact)  # control: rounding did something
    near_zero = torch.logspace(-30, -6, 5000)  # which float16 could not hold
    exact = compute_scale(near_zero, INT4)
    scale = compute_scale(near_zero, INT4, scale_dtype=torch.bfloat16)
    assert torch.equal(scale.bfloat16().float(), scale)
    assert ((scale >= exact) & (scale <= exact * (1 + 1 / 8))).all()


def test_scales_of_other_dtypes_are_refused():
    with pytest.raises(AssertionError, match=r"amax is torch\.bfloat16"):
        compute_scale(torch.ones(1, dtype=torch.bfloat16), INT8)
    with pytest.raises(AssertionError, match="no grid to round up to"):
        compute_scale(torch.ones(1), INT8, scale_dtype=torch.float16)


@pytest.mark.parametrize("dtype", BITS, ids=label)
@pytest.mark.parametrize("granularity", [PerChannel(), PerGroup(32), PerGroup(48)], ids=label)
def test_zero_points_give_the_same_values_in_training_and_from_codes(granularity, dtype):
    x = (randn(8, 160) + 0.5).to(dtype)
    scale, zero = compute_affine(compute_range(x, granularity), UINT4)
    scale = scale * 0.75  # some values clip
    codes = quantize(x, scale, UINT4, granularity, zero_point=zero)
    assert int(codes.min()) == 0 and int(codes.max()) == 15
    served = dequantize(codes, scale, granularity, dtype, zero_point=zero)
    trained = fake_quantize(x.clone().requires_grad_(), scale, UINT4, granularity, zero_point=zero)
    assert same_bits(trained.detach(), served)
    assert same_bits(fake_quantize(x, scale, UINT4, granularity, zero_point=zero), served)
    assert not torch.equal(dequantize(codes, scale, granularity, dtype), served)  # control


def test_zero_stays_zero_under_a_zero_point_and_the_range_is_covered_by_hand():
    x = torch.tensor([[-1.0, 0.0, 0.3, 4.0]])
    scale, zero = compute_affine(compute_range(x, PerChannel()), UINT4)
    assert scale.tolist() == (torch.tensor([5.0]) / 15).tolist() and zero.tolist() == [3]
    codes = quantize(x, scale, UINT4, PerChannel(), zero_point=zero)
    assert codes.tolist() == [[0, 3, 4, 15]]
    one_sided, start = compute_affine(compute_range(x + 1, PerChannel()), UINT4)
    assert start.tolist() == [0] and one_sided.tolist() == scale.tolist()


def test_the_gradient_of_asymmetric_codes_stops_at_both_ends():
    x = torch.tensor([-3.6, -3.4, 12.4, 12.6], requires_grad=True)
    scale, zero = torch.tensor([1.0]), torch.tensor([3], dtype=torch.int32)
    fake_quantize(x, scale, UINT4, PerTensor(), zero_point=zero).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 0.0]


def test_reach_widens_the_range_that_is_trained():
    x = torch.tensor([5.0, 6.5, 8.0, 8.1], requires_grad=True)
    grads = {}
    for ste_clip_range in (None, 8.0, float("inf")):
        (grads[ste_clip_range],) = torch.autograd.grad(
            fake_quantize(
                x, torch.tensor([1.0]), FP4_E2M1, PerTensor(), ste_clip_range=ste_clip_range
            ).sum(),
            x,
        )
    assert grads[None].tolist() == [1, 0, 0, 0]
    assert grads[8.0].tolist() == [1, 1, 1, 0]
    assert grads[float("inf")].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(("fmt", "levels"), [(TERNARY, 3), (INT2_ELASTIC, 4)])
def test_stretched_grids_are_those_of_paretoq(fmt, levels):
    """arXiv:2502.02631: levels (round(k/2 clip(w/alpha) - shift) + shift) / (k/2), alpha = amax."""
    x = randn(4, 500)
    alpha = x.abs().amax(dim=1, keepdim=True)
    shift = 0.5 if levels % 2 == 0 else 0.0
    stretched = (x / alpha).clamp(-0.99, 0.99) * levels / 2
    expected = ((stretched - shift).round() + shift) / (levels / 2) * alpha
    found = fake_quantize(x, compute_scale(alpha[:, 0], fmt), fmt, PerChannel())
    assert torch.allclose(found, expected, rtol=1e-6)
    assert all(row.unique().numel() == levels for row in found)


@pytest.mark.parametrize("fmt", [TERNARY, INT2_ELASTIC])
def test_the_maximum_of_a_stretched_grid_is_trained(fmt):
    x = randn(4, 50).requires_grad_()
    scale = compute_scale(compute_amax(x, PerChannel()), fmt)
    ste_clip_range = TensorScheme(fmt, PerChannel()).ste_clip_range
    fake_quantize(x, scale, fmt, PerChannel(), ste_clip_range=ste_clip_range).sum().backward()
    assert (x.grad == 1).all()


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), PerGroup(5), PerBlock(4)])
def test_the_maximum_of_bfloat16_numbers_is_that_of_their_floats(granularity):
    x = torch.randn(6, 13, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[0, 0] = -100.0
    expected = granularity.largest(x.float().abs())
    assert compute_amax(x, granularity).dtype == torch.float32
    assert torch.equal(compute_amax(x, granularity), expected)
    x[1, 1] = torch.inf
    x[5, 12] = -torch.nan
    found = compute_amax(x, granularity)
    assert found.isnan().any() and not torch.equal(found, expected)  # control
    if not isinstance(granularity, PerTensor):
        assert found.isinf().any()

import pytest
import torch

from mqat.kernels.gemm import (
    EXACT_BLOCK,
    int8_matmul,
    int8_matmul_emulated,
    int8_matmul_native,
)
from mqat.kernels.operators import apply_mask_, decode, encode, scaled_matmul
from mqat.kernels.reference import pack_mask, unpack_mask
from mqat.quant.formats import FP8_E4M3, INT4, INT8, INT8_MIN128
from mqat.quant.functional import fake_quantize, quantize
from mqat.quant.granularity import PerChannel, PerGroup, PerTensor
from mqat.quant.scales import compute_amax


def codes(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)


@pytest.mark.parametrize("features", [8, 1000, EXACT_BLOCK, EXACT_BLOCK + 1, 5000])
def test_both_integer_gemms_give_the_exact_integers(features):
    x, w = codes(17, features), codes(24, features, seed=1)
    expected = x.long() @ w.long().t()
    for product in (int8_matmul_native(x, w), int8_matmul_emulated(x, w), int8_matmul(x, w)):
        assert torch.equal(product.long(), expected)


def test_the_largest_sums_are_exact_and_one_float32_gemm_would_not_be():
    x = torch.full((17, 4099), -128, dtype=torch.int8)
    w = torch.full((8, 4099), -128, dtype=torch.int8)
    x[:, :3], w[:, :3] = 1, 1
    expected = x.long() @ w.long().t()
    assert torch.equal(int8_matmul_emulated(x, w).long(), expected)
    assert not torch.equal((x.float() @ w.float().t()).long(), expected)  # control


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_float8_code_decodes_to_its_value(backend, dtype):
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    expected = every.to(dtype)
    numbers = ~expected.isnan()
    assert int(numbers.sum()) == 254
    assert torch.equal(decode(every, dtype)[numbers], expected[numbers])


@pytest.mark.parametrize("shape", [(3,), (8,), (5, 7), (4, 16)])
def test_packed_masks_come_back_in_the_same_order(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.5
    packed = pack_mask(mask)
    assert packed.numel() == -(-mask.numel() // 8)
    assert torch.equal(unpack_mask(packed, shape).bool(), mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masking_keeps_bits_or_zeroes_them(backend, dtype):
    x = torch.randn(5, 16).to(dtype)
    mask = torch.rand(5, 16) > 0.5
    expected = torch.where(mask, x, 0.0)
    apply_mask_(x, pack_mask(mask), None)
    assert torch.equal(x, expected)


@pytest.mark.parametrize(
    ("fmt", "granularity"),
    [
        (INT8_MIN128, PerTensor()),
        (INT8, PerChannel()),
        (INT4, PerGroup(16)),
        (FP8_E4M3, PerTensor()),
    ],
)
def test_encoding_equals_the_reference_codes_and_gradient_mask(backend, fmt, granularity):
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    scale = compute_amax(x, granularity) / fmt.max_value * 0.5  # clips
    encoded = encode(x, scale, fmt, granularity, with_mask=True)
    expected = quantize(x, scale, fmt, granularity)
    assert torch.equal(encoded.codes.view(torch.uint8), expected.view(torch.uint8))
    fake_quantize(x, scale, fmt, granularity).sum().backward()
    assert torch.equal(unpack_mask(encoded.mask, (6, 32)).float(), x.grad)
    assert 0 < int(x.grad.sum()) < x.numel()  # control: something is clipped, something is not


def test_nan_in_an_operand_makes_the_whole_result_nan_and_infinity_does_not(backend):
    w = codes(8, 16)
    for value, is_nan in ((float("nan"), True), (float("inf"), False)):
        x = torch.randn(4, 16)
        x[1, 2] = value
        encoded = encode(x, torch.tensor([0.1]), INT8_MIN128, PerTensor(), with_mask=False)
        y = scaled_matmul(encoded.codes, w, encoded.scale, torch.float32)
        assert bool(y.isnan().all()) == is_nan

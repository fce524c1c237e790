"""The same tensors through nvidia-modelopt and torchao, where they run on a CPU.

Optional: `pip install 'mqat[peers]'`. Zeros, denormals, the largest numbers and random ones; codes and
scales bit for bit. Peers that multiply by a reciprocal may decide ties otherwise: those elements are
told apart.
"""

import pytest
import torch

from mqat.quant.algorithm import named_scheme
from mqat.quant.formats import FP4_E2M1, FP8_E4M3, INT8, UINT4
from mqat.quant.functional import quantize
from mqat.quant.granularity import PerChannel, PerGroup, PerTensor, PerToken
from mqat.quant.packing import pack_nibbles
from mqat.quant.quantizer import Quantizer
from mqat.quant.scales import (
    block_scales,
    compute_affine,
    compute_amax,
    compute_global_scale,
    compute_range,
    compute_scale,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def numbers(dtype, rows=32, columns=256):
    """Random rows of very different size, and rows of zeros, denormals, equal and large numbers."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, columns, generator=generator)
    x *= torch.logspace(-3, 3, rows)[:, None]
    x[0], x[1], x[2] = 0, torch.finfo(dtype).tiny / 4, 3e4
    x[3, ::2], x[4, 5] = 0, -6e4
    return x.to(dtype)


def differ_in_ties_only(found, expected, ratio):
    """Codes that differ do so by one, at a ratio that lies between two codes."""
    different = found.int() != expected.int()
    assert (found.int() - expected.int()).abs().max() <= 1
    assert ((ratio[different] % 1 - 0.5).abs() < 1e-4).all()
    assert different.float().mean() < 0.01


@pytest.fixture(scope="module")
def modelopt():
    reason = "optional: pip install 'mqat[peers]'"
    return pytest.importorskip("modelopt.torch.quantization.qtensor", reason=reason)


@pytest.fixture(scope="module")
def torchao():
    reason = "optional: pip install 'mqat[peers]'"
    return pytest.importorskip("torchao.quantization.quant_primitives", reason=reason)


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_channels_are_modelopts(modelopt, dtype):
    from modelopt.torch.quantization.tensor_quant import fake_tensor_quant

    x = numbers(dtype).float()
    amax = compute_amax(x, PerChannel())
    scale = compute_scale(amax, INT8)
    theirs = fake_tensor_quant(x, amax[:, None], None, 8, False, True)
    rows = amax > 1e-3  # it replaces tiny maxima by a floor of its own
    ratio = (x.double() / scale[:, None].double())[rows]
    codes = (theirs.double() / scale[:, None].double()).round()[rows]
    differ_in_ties_only(codes, quantize(x, scale, INT8, PerChannel())[rows], ratio)
    assert rows.sum() > 20


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_codes_are_modelopts(modelopt, dtype):
    x = numbers(dtype)
    scale = compute_scale(compute_amax(x.float(), PerTensor()), FP8_E4M3)
    theirs, _ = modelopt.FP8QTensor.quantize(x.float(), scales=scale)
    ours = quantize(x, scale, FP8_E4M3, PerTensor())
    assert torch.equal(theirs._quantized_data.view(torch.uint8), ours.view(torch.uint8))


def two_levels(x):
    amax = compute_amax(x.float(), PerGroup(16))
    above = compute_global_scale(amax.amax().reshape(1), FP4_E2M1)
    return compute_scale(amax, FP4_E2M1, scale_dtype=torch.float8_e4m3fn, global_scale=above), above


def test_nvfp4_scales_and_codes_are_modelopts(modelopt):
    x = numbers(torch.float32)
    scale, above = two_levels(x)
    theirs, blocks, upper = modelopt.NVFP4QTensor.quantize(x, 16)
    assert torch.equal(upper.reshape(1), above)
    ours = block_scales(scale, above)
    same = blocks.view(torch.uint8) == ours.view(torch.uint8)
    assert same[1:].all() and not same[0].any()  # it gives all-zero blocks the scale 1
    packed = pack_nibbles(quantize(x, scale, FP4_E2M1, PerGroup(16)))
    same = packed == theirs._quantized_data.view(torch.uint8).view_as(packed)
    assert same.float().mean() > 0.9  # the sign of zeros
    assert torch.equal(packed[5:] & 0x77, theirs._quantized_data.view_as(packed)[5:] & 0x77)


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_channels_are_torchaos(torchao, dtype):
    x = numbers(dtype).float()
    block, form = (1, x.shape[1]), torchao.MappingType.SYMMETRIC_NO_CLIPPING_ERR
    scale = compute_scale(compute_amax(x, PerChannel()), INT8)
    theirs, _ = torchao.choose_qparams_affine(x, form, block, torch.int8, -127, 127, eps=2.0**-126)
    torch.testing.assert_close(theirs.float().flatten(), scale, rtol=1e-6, atol=0)
    zero = torch.zeros_like(scale, dtype=torch.int32)
    codes = torchao.quantize_affine(x, block, scale, zero, torch.int8, -127, 127)
    ratio = x.double() / scale[:, None].double()
    differ_in_ties_only(codes, quantize(x, scale, INT8, PerChannel()), ratio)


def test_uint4_groups_with_zero_points_are_torchaos(torchao):
    x, grain = numbers(torch.float32), PerGroup(64)
    scale, zero = compute_affine(compute_range(x, grain), UINT4)
    theirs, zeros = torchao.choose_qparams_affine(
        x, torchao.MappingType.ASYMMETRIC, (1, 64), torch.uint8, 0, 15, eps=2.0**-126
    )
    torch.testing.assert_close(theirs.view_as(scale), scale, rtol=1e-6, atol=0)
    assert torch.equal(zeros.view_as(zero).int(), zero)
    codes = torchao.quantize_affine(x, (1, 64), scale, zero, torch.uint8, 0, 15)
    ratio = x.double() / grain.expand(scale, tuple(x.shape)).double()
    differ_in_ties_only(codes, quantize(x, scale, UINT4, grain, zero_point=zero), ratio)


def test_tokens_of_8da4w_are_torchaos(torchao):
    x = numbers(torch.float32)
    quantizer = Quantizer(named_scheme("8da4w").input, None, "x")
    quantizer.load_({})
    scale, zero = quantizer.qparams(x)
    theirs, zeros = torchao.choose_qparams_affine(
        x, torchao.MappingType.ASYMMETRIC, (1, x.shape[1]), torch.int8, -128, 127, eps=2.0**-126
    )
    torch.testing.assert_close(theirs.flatten(), scale.flatten(), rtol=1e-6, atol=0)
    assert torch.equal(zeros.flatten().int(), zero.flatten())
    assert isinstance(quantizer.scheme.granularity, PerToken)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_mxfp8_scales_and_codes_are_torchaos(torchao, dtype):
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor", reason="not in this torchao")
    x = numbers(dtype)[5:]
    scales, codes = mx.to_mx(x.contiguous(), torch.float8_e4m3fn, 32)
    scheme = named_scheme("mxfp8").weight
    ours = compute_scale(
        compute_amax(x.float(), PerGroup(32)), FP8_E4M3, scale_dtype=scheme.scale_dtype
    )
    assert torch.equal(scales.float().view_as(ours), ours)
    found = quantize(x, ours, FP8_E4M3, PerGroup(32))
    assert torch.equal(codes.view(torch.uint8).view_as(found), found.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_steps_are_modelopts_rounded_up_to_bfloat16(modelopt, dtype):
    """From modelopt's own amax; TensorRT-LLM's graph casts steps to the model's dtype."""
    x = numbers(dtype)
    _, theirs = modelopt.FP8QTensor.quantize(x.float())
    theirs = theirs.float().reshape(1)
    scheme = named_scheme("fp8").weight
    amax = compute_amax(x.float(), PerTensor())
    ours = compute_scale(amax, FP8_E4M3, scale_dtype=scheme.scale_dtype)
    assert torch.equal(compute_scale(amax, FP8_E4M3), theirs)
    assert ours == ours.bfloat16() and theirs <= ours <= theirs * (1 + 2.0**-7)

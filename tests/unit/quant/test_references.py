"""Numerics against other people's implementations, and against tables made by hand."""

from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
import torch
from torch import Tensor

from mqat.quant.algorithm import named_scheme
from mqat.quant.formats import (
    FP4_E2M1,
    FP8_E4M3,
    FP8_E5M2,
    INT4_AMAX7_5,
    INT8,
    INT8_MIN128,
    NF4,
    UINT4,
    QuantFormat,
)
from mqat.quant.functional import dequantize, fake_quantize, quantize
from mqat.quant.granularity import PerChannel, PerGroup, PerTensor, PerToken
from mqat.quant.qparams import statistic_of
from mqat.quant.quantizer import Quantizer
from mqat.quant.scales import (
    EXPONENTS,
    block_scales,
    compute_affine,
    compute_amax,
    compute_global_scale,
    compute_range,
    compute_scale,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ONE = torch.tensor([1.0])


def numbers(dtype: torch.dtype) -> Tensor:
    """Random magnitudes, ties, zeros of both signs, subnormals and the largest numbers."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-140, 128, (20_000,), generator=generator).float()
    spread = torch.randn(20_000, generator=generator) * torch.exp2(exponents)
    plain = torch.randn(20_000, generator=generator) * 50
    ties = torch.arange(-2048, 2048) / 8
    limits = torch.finfo(dtype)
    edges = torch.tensor([0.0, limits.max, limits.tiny, limits.smallest_normal * 2.0**-5, 1e-45])
    every = torch.cat([spread, plain, ties, edges, -edges]).to(dtype)
    return every[every.isfinite()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", [FP8_E4M3, FP8_E5M2], ids=lambda fmt: fmt.name)
def test_fp8_is_torchs_cast_of_the_saturated_value(fmt: QuantFormat, dtype):
    x = numbers(dtype)
    expected = x.float().clamp(fmt.qmin, fmt.qmax).to(fmt.storage_dtype)
    codes = quantize(x, ONE, fmt, PerTensor())
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(fake_quantize(x, ONE, fmt, PerTensor()), expected.to(dtype))
    assert x.float().abs().max() > fmt.qmax  # control: something saturated


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", [FP8_E4M3, FP8_E5M2, FP4_E2M1], ids=lambda fmt: fmt.name)
def test_small_floats_are_those_of_ml_dtypes(fmt: QuantFormat, dtype):
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes comes with the dev extra")
    names = {"fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2", "fp4_e2m1": "float4_e2m1fn"}
    x = numbers(dtype)
    saturated = x.float().clamp(fmt.qmin, fmt.qmax).numpy()
    expected = saturated.astype(getattr(ml_dtypes, names[fmt.name]))
    codes = quantize(x, ONE, fmt, PerTensor())
    mask = 0xF if fmt == FP4_E2M1 else 0xFF
    assert np.array_equal(codes.view(torch.uint8).numpy() & mask, expected.view(np.uint8) & mask)
    values = fake_quantize(x, ONE, fmt, PerTensor()).float().numpy()
    rounded = torch.from_numpy(expected.astype(np.float32)).to(dtype).float().numpy()
    assert values.tobytes() == rounded.tobytes()


def test_e2m1_by_hand():
    x = [0.0, 0.25, 0.26, 0.75, 1.25, 1.75, 2.5, 2.51, 3.5, 5.0, 5.1, 7.0, float("inf")]
    value = [0.0, 0.0, 0.5, 1.0, 1.0, 2.0, 2.0, 3.0, 4.0, 4.0, 6.0, 6.0, 6.0]
    code = [0, 0, 1, 2, 2, 4, 4, 5, 6, 6, 7, 7, 7]
    both = torch.tensor(x + [-number for number in x])
    assert quantize(both, ONE, FP4_E2M1, PerTensor()).tolist() == code + [8 + c for c in code]
    assert fake_quantize(both, ONE, FP4_E2M1, PerTensor()).tolist() == value + [-v for v in value]


@pytest.mark.parametrize(
    ("amax", "exponent"),
    [
        (6.0, 0), (7.99, 0), (8.0, 1), (4.0, 0), (3.99, -1), (1.0, -2), (448.0, 6),
        (0.0, -127), (1e-45, -127), (2.0**-126, -127), (2.0**-125, -127), (2.0**-124, -126),
        (3.4e38, 125),
    ],
)  # fmt: skip
def test_e8m0_scales_by_hand(amax, exponent):
    scale = compute_scale(torch.tensor([amax]), FP4_E2M1, scale_dtype=torch.float8_e8m0fnu)
    assert scale.double().item() == 2.0**exponent


@pytest.mark.parametrize(
    ("fmt", "amax", "floor", "nearest", "ceil"),
    [
        (FP4_E2M1, 6.0, 0, 0, 0), (FP4_E2M1, 6.01, 0, 0, 1), (FP4_E2M1, 6.99, 0, 0, 1),
        (FP4_E2M1, 7.0, 0, 1, 1), (FP4_E2M1, 7.99, 0, 1, 1), (FP4_E2M1, 8.0, 1, 1, 1),
        (FP8_E4M3, 448.0, 0, 0, 0), (FP8_E4M3, 479.9, 0, 0, 1), (FP8_E4M3, 480.0, 0, 1, 1),
        (FP4_E2M1, 0.0, -127, -127, -127), (FP4_E2M1, 3.4e38, 125, 126, 126),
    ],
)  # fmt: skip
def test_exponents_by_hand(fmt, amax, floor, nearest, ceil):
    expected = {"floor": floor, "nearest": nearest, "ceil": ceil}
    for rule, exponent in expected.items():
        scale = compute_scale(
            torch.tensor([amax]), fmt, scale_dtype=torch.float8_e8m0fnu, exponent=rule
        )
        assert scale.double().item() == 2.0**exponent, rule
        if rule == "ceil":
            assert scale * fmt.max_value >= min(amax, 2e38)


@pytest.mark.parametrize("fmt", [FP4_E2M1, FP8_E4M3, FP8_E5M2, INT8], ids=lambda fmt: fmt.name)
def test_e8m0_scales_are_those_of_ml_dtypes_and_floor_the_logarithm(fmt):
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes comes with the dev extra")
    amax = numbers(torch.float32).abs()
    scale = compute_scale(amax, fmt, scale_dtype=torch.float8_e8m0fnu)
    stored = scale.numpy().astype(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    assert stored.tobytes() == scale.numpy().tobytes()
    assert torch.equal(scale.to(torch.float8_e8m0fnu).float(), scale)
    inside = (scale > 2.0**-127) & (scale < 2.0**127)
    ratio = (amax.double() / scale.double())[inside]
    top = 2.0**fmt.max_exponent
    assert ratio.min() >= top and ratio.max() < 2 * top and top <= fmt.max_value < 2 * top


def test_scales_of_what_is_not_finite_are_nan_in_e8m0():
    amax = torch.tensor([float("nan"), float("inf")])
    for rule in EXPONENTS:
        scale = compute_scale(amax, FP4_E2M1, scale_dtype=torch.float8_e8m0fnu, exponent=rule)
        assert scale.isnan().all()


def test_nearest_exponents_are_those_of_compressed_tensors():
    theirs = pytest.importorskip(
        "compressed_tensors.quantization.utils.mxfp_utils",
        reason="compressed-tensors comes with the dev extra",
    )
    amax = numbers(torch.float32).abs()
    amax = amax[(amax > 2.0**-120) & (amax < 2.0**120)]
    stored = theirs.generate_mx_scales(amax, num_bits=4)
    for rule in EXPONENTS:
        ours = compute_scale(amax, FP4_E2M1, scale_dtype=torch.float8_e8m0fnu, exponent=rule)
        assert torch.equal(ours.log2() + 127, stored) == (rule == "nearest"), rule


def test_nf4_levels_are_quantiles_of_a_normal_distribution():
    """bitsandbytes' construction: 8 quantiles above zero, 7 below, from 0.9677083 to the median."""
    inverse, offset = NormalDist().inv_cdf, 0.9677083
    positive = [inverse(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    negative = [-inverse(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    expected = np.array(sorted([*positive, 0.0, *negative])) / max(positive)
    assert np.allclose(expected, NF4.levels, atol=1e-6)
    assert len(NF4.levels) == 16 and NF4.levels[7] == 0.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nf4_takes_the_nearest_level(dtype):
    x = torch.cat([torch.linspace(-1, 1, 50_001), torch.tensor([-0.0, 1e-45, 3.0, -3.0])]).to(dtype)
    codes = quantize(x, ONE, NF4, PerTensor())
    distance = np.abs(x.double().numpy()[:, None] - np.array(NF4.levels))
    chosen = np.take_along_axis(distance, codes.numpy()[:, None].astype(int), 1)[:, 0]
    assert (chosen <= distance.min(axis=1) + 1e-7).all()
    found = dequantize(codes, ONE, PerTensor(), torch.float32, fmt=NF4)
    assert found.tolist() == np.array(NF4.levels, dtype=np.float32)[codes.numpy()].tolist()


@pytest.mark.parametrize("fmt", [INT8_MIN128, UINT4, INT4_AMAX7_5], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("step", [0.25, 2.0**-7])
def test_integers_are_torchs_fake_quantize_where_the_reciprocal_is_exact(fmt, step):
    x = numbers(torch.float32)
    x = x[x.abs() < 2.0**20]  # torch converts to int64 first
    zero = 3
    expected = torch.fake_quantize_per_tensor_affine(x, step, zero, int(fmt.qmin), int(fmt.qmax))
    found = fake_quantize(
        x, torch.tensor([step]), fmt, PerTensor(), zero_point=torch.tensor([zero])
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("fmt", [INT8_MIN128, UINT4], ids=lambda fmt: fmt.name)
def test_channels_differ_from_torchs_fake_quantize_in_ties_only(fmt):
    """torch multiplies by the rounded reciprocal of the scale; here x is divided."""
    x = torch.randn(64, 4096, generator=torch.Generator().manual_seed(1)) + 0.3
    scale, zero = compute_affine(compute_range(x, PerChannel()), fmt)
    expected = torch.fake_quantize_per_channel_affine(
        x, scale, zero, 0, int(fmt.qmin), int(fmt.qmax)
    )
    found = fake_quantize(x, scale, fmt, PerChannel(), zero_point=zero)
    ratio = x.double() / scale.double()[:, None]
    is_tie = ((ratio - ratio.floor()) - 0.5).abs() < 1e-4
    assert torch.equal(found[~is_tie], expected[~is_tie])
    assert is_tie.float().mean() < 1e-3


def test_nvfp4_is_the_two_level_formula_in_numpy():
    w = torch.randn(32, 80, generator=torch.Generator().manual_seed(2)) * 0.02
    w[3, 16:32] = 0.0
    w[4, :16] *= 1e-6  # its block scale underflows to E4M3's smallest
    quantizer = Quantizer(named_scheme("nvfp4").weight, tuple(w.shape), "w")
    quantizer.freeze_(statistic_of(w, quantizer.scheme), w.abs().amax().reshape(1))
    whole = np.float32(np.abs(w.numpy()).max()) / np.float32(6 * 448)
    blocks = w.numpy().reshape(32, 5, 16)
    ratio = np.abs(blocks).max(-1) / (np.float32(6) * whole)
    stored = torch.from_numpy(np.clip(ratio, 2.0**-9, 448)).to(torch.float8_e4m3fn)
    steps = stored.float().numpy() * whole
    assert quantizer.global_scale.item() == whole
    assert np.array_equal(quantizer.scale.numpy(), steps)
    found = block_scales(quantizer.scale, quantizer.global_scale)
    assert torch.equal(found.view(torch.uint8), stored.view(torch.uint8))
    levels = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)
    levels = np.concatenate([-levels, levels])
    scaled = np.clip(blocks / steps[..., None], -6, 6)
    values = levels[np.abs(scaled[..., None] - levels).argmin(-1)] * steps[..., None]
    assert np.array_equal(quantizer(w).numpy().reshape(32, 5, 16), values)  # no exact ties in here
    assert (values[3, 1] == 0).all() and stored.float().max() == 448


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_block_scales_are_recovered_exactly(scale):
    amax = torch.rand(10_000, generator=torch.Generator().manual_seed(3)).pow(4) * scale + 1e-37
    whole = compute_global_scale(amax.amax().reshape(1), FP4_E2M1)
    steps = compute_scale(amax, FP4_E2M1, scale_dtype=torch.float8_e4m3fn, global_scale=whole)
    assert torch.equal(block_scales(steps, whole).float() * whole, steps)


@pytest.mark.parametrize("algorithm", ["mxfp4", "mxfp8"])
def test_mx_inputs_are_the_ocp_conversion_in_numpy(algorithm):
    scheme = replace(named_scheme(algorithm).input, exponent="floor")
    quantizer = Quantizer(scheme, None, "x")
    quantizer.freeze_(torch.ones(1))
    x = torch.randn(3, 4, 96, generator=torch.Generator().manual_seed(4))
    x[0, 0, :32] = 0.0
    blocks = x.double().numpy().reshape(-1, 32)
    emax, largest = {"mxfp4": (2, 6.0), "mxfp8": (8, 448.0)}[algorithm]
    with np.errstate(divide="ignore"):
        exponent = np.floor(np.log2(np.abs(blocks).max(-1, keepdims=True))) - emax
    shared = 2.0 ** np.maximum(exponent, -127)
    saturated = torch.from_numpy(np.clip(blocks / shared, -largest, largest)).float()
    if algorithm == "mxfp8":
        elements = saturated.to(torch.float8_e4m3fn).float().numpy()
    else:
        elements = fake_quantize(saturated, ONE, FP4_E2M1, PerTensor()).numpy()  # tested above
    assert np.array_equal(quantizer(x).numpy().reshape(-1, 32), (elements * shared).astype("f4"))
    assert (np.abs(blocks / shared) > largest).any()  # control: something saturated
    assert not quantizer.frozen_tensors


def test_8da4w_inputs_are_torchaos_asymmetric_tokens_in_numpy():
    quantizer = Quantizer(named_scheme("8da4w").input, None, "x")
    quantizer.freeze_(torch.ones(1))
    x = torch.randn(5, 2, 64, generator=torch.Generator().manual_seed(5)) + 0.4
    x[0, 0] = x[0, 0].abs() + 1  # one-sided: zero must stay a code
    x[1, 1] = 0.0
    tokens = x.numpy().reshape(-1, 64)
    low, high = np.minimum(tokens.min(1), 0), np.maximum(tokens.max(1), 0)
    scale = np.maximum((high - low) / np.float32(255), np.float32(2.0**-126))[:, None]
    zero = np.clip(-128 - np.rint(low[:, None] / scale), -128, 127)
    codes = np.clip(np.rint(tokens / scale) + zero, -128, 127)
    expected = ((codes - zero) * scale).astype(np.float32)
    assert np.array_equal(quantizer(x).numpy().reshape(-1, 64), expected)
    assert len(np.unique(zero)) > 3  # control: tokens have their own zero points


def test_fp8_tokens_are_scaled_one_by_one():
    quantizer = Quantizer(named_scheme("fp8_pc_pt").input, None, "x")
    quantizer.freeze_(torch.ones(1))
    x = torch.randn(6, 2, 32, generator=torch.Generator().manual_seed(6)) * 10
    scale = x.abs().amax(-1, keepdim=True) / 448
    assert torch.equal(quantizer(x), (x / scale).to(torch.float8_e4m3fn).float() * scale)
    alone = torch.cat([quantizer(part) for part in x.split(1)])
    assert torch.equal(alone, quantizer(x))  # tokens do not depend on each other


@pytest.mark.parametrize("algorithm", ["mxfp4", "mxfp8", "nvfp4", "8da4w", "fp8_pc_pt"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible_in_its_own_group_only(algorithm, bad):
    quantizer = Quantizer(named_scheme(algorithm).input, None, "x")
    quantizer.freeze_(torch.ones(1))
    x = torch.ones(2, 64)
    clean = quantizer(x)
    x[0, 5] = bad
    result = quantizer(x)
    assert torch.equal(result[1], clean[1])
    is_saturated = algorithm == "nvfp4" and bad == float("inf")  # both levels have a largest number
    assert bool(result[0, 5].isfinite()) == is_saturated
    assert compute_amax(x, PerToken())[0].isfinite().item() is False


def test_int4_even_spreads_fifteen_steps_and_its_maximum_is_trained():
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(7))
    quantizer = Quantizer(named_scheme("8da4w").weight, tuple(w.shape), "w")
    quantizer.freeze_(statistic_of(w, quantizer.scheme))
    assert torch.equal(quantizer.scale, compute_amax(w, PerGroup(256)) / 7.5)
    w.requires_grad_()
    quantizer(w).sum().backward()
    assert (w.grad == 1).all()

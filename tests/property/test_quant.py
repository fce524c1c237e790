from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mqat.quant.formats import FORMATS, FP8_E4M3, INT4, QuantFormat
from mqat.quant.functional import (
    dequantize,
    fake_quantize,
    quantize,
)
from mqat.quant.granularity import PerBlock, PerChannel, PerGroup, PerTensor
from mqat.quant.observers import ActivationObserver
from mqat.quant.packing import (
    pack_int4,
    pack_nibbles,
    unpack_nibbles,
)
from mqat.quant.scales import compute_affine, compute_amax, compute_range, compute_scale

quick = settings(deadline=None, max_examples=60)
seeds = st.integers(0, 2**31)
signed = [f for f in FORMATS.values() if not f.is_unsigned]
# INT8_AMAX128 saturates a whole step below its maximum, as the loader does.
uniform = st.sampled_from([f for f in signed if f.is_uniform and f.name != "int8_loader"])
formats = st.sampled_from(signed)
affine = st.sampled_from([f for f in FORMATS.values() if not f.is_float])
granularities = st.one_of(
    st.just(PerTensor()),
    st.just(PerChannel()),
    st.integers(1, 40).map(PerGroup),
    st.integers(1, 40).map(PerBlock),
)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
scale_dtypes = st.sampled_from([torch.float32, torch.bfloat16])


def _matrix(rows: int, cols: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    magnitude = torch.exp2(torch.randint(-6, 7, (rows, 1), generator=generator).float())
    return torch.randn(rows, cols, generator=generator) * magnitude


@quick
@given(rows=st.integers(1, 8), cols=st.integers(1, 64), seed=seeds, fmt=uniform, g=granularities)
def test_rounding_error_is_at_most_half_a_step(rows, cols, seed, fmt, g):
    x = _matrix(rows, cols, seed)
    scale = compute_scale(compute_amax(x, g), fmt)
    error = (fake_quantize(x, scale, fmt, g) - x).abs()
    steps = g.expand(scale, (rows, cols))
    assert (error <= 0.5 * steps * (1 + 1e-4)).all()  # 1e-4: float32 division and product


@quick
@given(cols=st.integers(1, 64), seed=seeds, scale_dtype=scale_dtypes)
def test_fp8_error_is_at_most_half_a_unit_in_the_last_of_four_places(cols, seed, scale_dtype):
    x = _matrix(4, cols, seed)
    scale = compute_scale(compute_amax(x, PerTensor()), FP8_E4M3, scale_dtype=scale_dtype)
    error = (fake_quantize(x, scale, FP8_E4M3, PerTensor()) - x).abs()
    bound = torch.maximum(x.abs() * 2.0**-4, scale * 2.0**-10)  # normal numbers, subnormal ones
    assert (error <= bound * (1 + 1e-4)).all()


@quick
@given(
    cols=st.integers(1, 100), seed=seeds, fmt=formats, g=granularities, dtype=dtypes, s=scale_dtypes
)
def test_training_values_are_what_codes_dequantize_to_and_a_fixed_point(
    cols, seed, fmt, g, dtype, s
):
    x = _matrix(4, cols, seed).to(dtype)
    scale = compute_scale(compute_amax(x, g), fmt, scale_dtype=s)
    codes = quantize(x, scale, fmt, g)
    once = fake_quantize(x.requires_grad_(), scale, fmt, g).detach()
    bits = torch.int32 if dtype == torch.float32 else torch.int16  # 0.0 and -0.0 differ
    assert torch.equal(once.view(bits), dequantize(codes, scale, g, dtype, fmt=fmt).view(bits))
    assert torch.equal(fake_quantize(once, scale, fmt, g).view(bits), once.view(bits))


@quick
@given(cols=st.integers(1, 64), seed=seeds, fmt=formats, g=granularities, shrink=st.floats(0.1, 1))
def test_gradient_passes_where_the_ratio_is_in_range_and_nowhere_else(cols, seed, fmt, g, shrink):
    x = _matrix(4, cols, seed).requires_grad_()
    scale = compute_scale(compute_amax(x, g), fmt) * shrink
    grad = _matrix(4, cols, seed + 1)
    fake_quantize(x, scale, fmt, g).backward(grad)
    ratio = x.detach() / g.expand(scale, (4, cols))
    slack = 0.0 if fmt.is_float else 0.5
    inside = (ratio >= fmt.qmin - slack) & (ratio <= fmt.qmax + slack)
    assert torch.equal(x.grad, torch.where(inside, grad, 0.0))


@quick
@given(rows=st.integers(1, 4), groups=st.integers(2, 6), size=st.integers(1, 16), seed=seeds)
def test_a_matrix_cut_at_group_borders_has_the_codes_of_the_whole(rows, groups, size, seed):
    x, g = _matrix(rows, groups * size, seed), PerGroup(size)
    cut = (groups // 2) * size
    parts = (x[:, :cut], x[:, cut:])
    scales = [compute_scale(compute_amax(part, g), INT4) for part in parts]
    whole = compute_scale(compute_amax(x, g), INT4)
    assert torch.equal(torch.cat(scales, dim=1), whole)
    codes = [quantize(part, scale, INT4, g) for part, scale in zip(parts, scales, strict=True)]
    assert torch.equal(torch.cat(codes, dim=1), quantize(x, whole, INT4, g))


@quick
@given(pairs=st.integers(0, 8), cols=st.integers(0, 33), seed=seeds)
def test_row_pairs_are_the_nibbles_of_their_bytes(pairs, cols, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (2 * pairs, cols), generator=generator).to(torch.int8)
    packed = pack_int4(codes)
    assert packed.shape == (pairs, cols) and packed.dtype == torch.int8
    assert torch.equal(packed >> 4, codes[1::2])
    assert torch.equal((packed & 0xF) - 16 * (packed & 8 > 0), codes[0::2])


@quick
@given(
    cuts=st.lists(st.integers(0, 500), max_size=4),
    seed=seeds,
    order=st.randoms(use_true_random=False),
    percentile=st.floats(1, 100),
)
def test_observers_agree_exactly_however_the_tokens_are_divided(cuts, seed, order, percentile):
    x = _matrix(5, 100, seed).flatten()
    whole = ActivationObserver("percentile")
    whole.observe_(x)
    bounds = [0, *sorted(cuts), x.numel()]
    parts = [x[a:b] for a, b in pairwise(bounds)]  # some are empty
    order.shuffle(parts)
    merged = ActivationObserver("percentile")
    for part in parts:
        rank = ActivationObserver("percentile")
        rank.observe_(part)
        torch.maximum(merged.statistics, rank.statistics, out=merged.statistics)
        merged.histogram += rank.histogram
    assert torch.equal(merged.statistics, whole.statistics)
    assert torch.equal(merged.histogram, whole.histogram)
    assert torch.equal(merged.amax(percentile), whole.amax(percentile))
    assert merged.amax(percentile) <= merged.amax()


@quick
@given(cols=st.integers(1, 64), seed=seeds, fmt=affine, g=granularities, shift=st.floats(-3, 3))
def test_asymmetric_error_is_at_most_half_a_step_and_zero_is_exact(cols, seed, fmt, g, shift):
    x = _matrix(4, cols, seed) + shift
    x[0, 0] = 0.0
    scale, zero = compute_affine(compute_range(x, g), fmt)
    steps = g.expand(scale, (4, cols))
    values = fake_quantize(x, scale, fmt, g, zero_point=zero)
    # Rounding the zero point moves both ends by up to half a step.
    assert ((values - x).abs() <= steps * (1 + 1e-4)).all()
    low, high = (float(fmt.qmin), float(fmt.qmax))
    codes = quantize(x, scale, fmt, g, zero_point=zero).float()
    assert (
        ((values - x).abs() <= 0.5 * steps * (1 + 1e-4)) | (codes == low) | (codes == high)
    ).all()
    assert values[0, 0] == 0.0
    again = fake_quantize(values, scale, fmt, g, zero_point=zero)
    assert torch.equal(again, values)


@quick
@given(cols=st.integers(1, 64), seed=seeds, g=granularities)
def test_e2m1_error_is_at_most_half_the_distance_of_its_neighbours(cols, seed, g):
    fmt: QuantFormat = FORMATS["fp4_e2m1"]
    x = _matrix(4, cols, seed)
    scale = compute_scale(compute_amax(x, g), fmt)
    steps = g.expand(scale, (4, cols))
    error = (fake_quantize(x, scale, fmt, g) - x).abs() / steps
    magnitude = x.abs() / steps
    bound = torch.where(magnitude < 4, torch.where(magnitude < 2, 0.25, 0.5), 1.0)
    assert (error <= bound * (1 + 1e-4)).all()


@quick
@given(shape=st.lists(st.integers(0, 5), max_size=2), pairs=st.integers(0, 9), seed=seeds)
def test_packing_neighbours_is_the_identity_after_unpacking(shape, pairs, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (*shape, 2 * pairs), generator=generator).to(torch.uint8)
    packed = pack_nibbles(codes)
    assert packed.shape == (*shape, pairs)
    assert torch.equal(unpack_nibbles(packed), codes)

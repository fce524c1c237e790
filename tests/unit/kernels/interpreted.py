"""CUDA's kernels in Triton's interpreter against the reference, bit for bit; run by test_triton.py.

In a process of its own: what Triton does is decided when it is imported. The interpreter rounds casts
to bfloat16 and float8 wrongly; here it casts as torch does.
"""

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from mqat.kernels import reference
from mqat.kernels.triton import passes
from mqat.quant.formats import (
    FP4_E2M1,
    FP8_E4M3,
    INT4,
    INT4_AMAX7_5,
    INT8,
    INT8_MIN128,
    NF4,
    TERNARY,
)
from mqat.quant.granularity import PerBlock, PerChannel, PerGroup, PerTensor, PerToken
from mqat.quant.scales import compute_affine, compute_range

TORCH = {
    tl.float32: torch.float32,
    tl.bfloat16: torch.bfloat16,
    tl.float16: torch.float16,
    tl.float8e4nv: torch.float8_e4m3fn,
}


def convert(data, source, target, rounding):
    """Replaces the interpreter's: bits of one float type to bits of another, by torch."""
    bits = torch.from_numpy(np.ascontiguousarray(data).view(f"int{8 * data.itemsize}"))
    cast = bits.view(TORCH[source]).to(TORCH[target])
    signed = {1: torch.int8, 2: torch.int16, 4: torch.int32}[cast.element_size()]
    return cast.view(signed).numpy().view(f"uint{8 * cast.element_size()}").reshape(data.shape)


@pytest.fixture(autouse=True)
def newest_gpu(monkeypatch):
    """Tensors of the CPU count as an H100's, and nothing may be left to the reference unseen."""
    monkeypatch.setattr(interpreter, "_convert_float", convert)
    monkeypatch.setattr(passes, "capability", lambda device: (9, 0))
    monkeypatch.setattr(passes, "_is_served", lambda device: True)
    monkeypatch.setattr(passes, "has_fp8_units", lambda device: True)


class Launches(list):
    """Names of the kernels that ran."""


@pytest.fixture
def launched(monkeypatch):
    names, launch = Launches(), passes._launch

    def counted(kernel, *arguments, **constants):
        names.append(kernel)
        launch(kernel, *arguments, **constants)

    monkeypatch.setattr(passes, "_launch", counted)
    return names


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def both(name, *arguments):
    """What the backend returns, or has written to its first argument, and what the reference does."""
    found = []
    for backend in (passes, reference):
        copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]
        results = getattr(backend, name)(*copies)
        results = (copies[0],) if results is None else results
        found.append((results,) if isinstance(results, torch.Tensor) else results)
    return found


def assert_same(found, expected):
    """The same bits, signs of zero included; any NaN equals any other."""
    for a, b in zip(found, expected, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        if a.dtype.is_floating_point:
            torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=0, equal_nan=True)
            a, b = (x.double().nan_to_num(0.0, posinf=1.0, neginf=-1.0).signbit() for x in (a, b))
        assert torch.equal(a, b)


def adversarial(rows, cols, dtype):
    """Ties of integers and of E4M3 and E2M1, infinities, zeros, subnormals, huge numbers."""
    x = normal(rows, cols) * 3
    flat = x.view(-1)
    ties = torch.arange(-140, 140) + 0.5
    levels = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    levels = levels[levels.isfinite()].sort().values
    between = (levels[1:] + levels[:-1]) / 2
    special = torch.tensor(
        [
            float("inf"),
            -float("inf"),
            0.0,
            -0.0,
            1e-45,
            -1e-45,
            1e-39,
            3e38,
            -3e38,
            1e-30,
            -0.1,
            0.25,
            5.0,
        ]
    )
    wild = torch.cat([special, ties, between, levels, (levels * (1 + 2**-12))])
    count = min(len(wild), flat.numel() // 2)
    flat[:count] = wild[:count]
    return x.to(dtype)


def steps(x, granularity, seed=1):
    """Powers of two among them, so that ties stay ties, and others."""
    shape = granularity.scale_shape(tuple(x.shape))
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 0.1 + 0.01
    scale.view(-1)[::2] = 1.0
    return scale


FORMATS = (INT8, INT8_MIN128, INT4, INT4_AMAX7_5, TERNARY, FP8_E4M3)
GRANULARITIES = (PerTensor(), PerChannel(), PerGroup(32), PerToken())


@pytest.mark.parametrize(
    ("granularity", "dtype"),
    [*((g, torch.float32) for g in GRANULARITIES), (PerChannel(), torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_codes_masks_and_values(fmt, granularity, dtype, launched):
    x = adversarial(35, 64, dtype)
    scale, names = steps(x, granularity), (fmt.name, str(granularity))
    for ste_clip_range in (8.5, None):
        found, expected = both("encode", x, scale, None, *names, ste_clip_range, True)
        assert_same(found, expected)
        assert bool((found[2] != 255).any())  # control: masks are not all ones
    assert_same(*both("fake_quantize_with_mask", x, scale, *names, None))
    assert_same(*both("fake_quantize_with_mask", x, scale, *names, None, False))
    assert_same(*both("decode", found[0], scale, None, names[1], dtype))
    assert_same(*both("decode", found[0], None, None, names[1], dtype))
    assert launched == ["encode"] * 2 + ["fake_quantize"] * 2 + ["decode"] * 2


def test_nothing_counts_as_clipped_in_an_infinite_range():
    x, scale = adversarial(35, 64, torch.float32), torch.ones(35)
    found, expected = both("encode", x, scale, None, "int8", "channel", float("inf"), True)
    assert_same(found, expected)
    assert bool((found[2] == 255).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [16, 32])
def test_blocks_of_e2m1(size, dtype, launched):
    x, granularity = adversarial(9, 96, dtype), PerGroup(size)
    x[0, :14] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0] * 2) * torch.tensor(
        [1.0, -1.0]
    ).repeat_interleave(7)
    found, expected = both(
        "fake_quantize_with_mask", x, steps(x, granularity), FP4_E2M1.name, str(granularity), None
    )
    assert_same(found, expected)
    assert launched == ["fake_quantize"]


@pytest.mark.parametrize("shape", [(1,), (7,), (2049,), (3, 5, 7), (4096,)])
def test_one_scale_takes_any_shape(shape, launched):
    x = normal(*shape) * 3
    scale = torch.tensor([0.02])
    found, expected = both("encode", x, scale, None, "int8", "tensor", None, True)
    assert_same(found, expected)
    assert_same(*both("fake_quantize_with_mask", x, scale, "int4", "tensor", None))
    assert_same(*both("decode", found[0], scale, None, "tensor", torch.bfloat16))
    dw = normal(*shape, seed=3)
    assert_same(*both("apply_mask_", dw, found[2], None))
    assert_same(*both("accumulate_", normal(*shape, seed=4), dw, found[2], scale))
    assert launched == ["encode", "fake_quantize", "decode", "apply_mask", "accumulate"]


def test_zero_points_of_tokens_and_of_unsigned_codes(launched):
    x = normal(9, 3, 64) + 0.3
    scale, zero = compute_affine(compute_range(x, PerToken()), INT8_MIN128)
    assert bool((zero != 0).any())
    for name, shift in ((INT8_MIN128.name, 0), ("uint8", 128)):
        found, expected = both("encode", x, scale, zero + shift, name, "token", None, False)
        assert_same(found, expected)
        assert_same(*both("decode", found[0], scale, zero + shift, "token", torch.float32))
    assert launched == ["encode", "decode"] * 2


@pytest.mark.parametrize("position", [0, 4099, -1])
def test_one_nan_marks_the_scale_and_nothing_else_does(position):
    x = adversarial(37, 127, torch.bfloat16)
    for fmt in (INT8, FP8_E4M3):
        clean, expected = both(
            "encode", x, torch.tensor([0.5]), None, fmt.name, "tensor", None, True
        )
        assert_same(clean, expected)
        assert bool(clean[1].isfinite())
        broken = x.clone()
        broken.view(-1)[position] = float("nan")
        found, expected = both(
            "encode", broken, torch.tensor([0.5]), None, fmt.name, "tensor", None, True
        )
        assert_same(found[1:], expected[1:])
        assert bool(found[1].isnan())
    # Zero steps divide zeros beyond the end, too.
    ones = torch.ones(3)
    assert_same(*both("encode", ones, torch.zeros(1), None, "int8", "tensor", None, True))


def test_nan_stays_nan_in_fake_quantization():
    x = normal(8, 32)
    x[1, 3] = float("nan")
    for name in ("int4", "fp8_e4m3", "fp4_e2m1"):
        found, expected = both("fake_quantize_with_mask", x, torch.ones(8), name, "channel", None)
        assert_same(found, expected)
        assert int(found[0].isnan().sum()) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [None, torch.tensor([0.3])], ids=["unscaled", "scaled"])
def test_masked_gradients(dtype, scale, launched):
    x = adversarial(48, 128, dtype)
    keep = torch.rand(48, 128, generator=torch.Generator().manual_seed(1)) > 0.1
    keep[16:40] = True  # a tile with nothing clipped
    x[0, 0], keep[0, 0] = float("nan"), False
    mask = reference.pack_mask(keep)
    total = normal(48, 128, seed=2)
    for bits in (mask, None):
        assert_same(*both("apply_mask_", x, bits, scale))
        assert_same(*both("accumulate_", total, x, bits, scale))
    found, _ = both("apply_mask_", x, mask, scale)
    assert torch.equal(found[0] == 0, ~keep | (x == 0) | (found[0] == 0))
    assert bool((found[0][~keep] == 0).all()) and bool((found[0][keep] != 0).any())
    assert launched.count("accumulate") == 2 and launched.count("apply_mask") >= 2


def gates_and_ups(rows, cols, dtype):
    """Gates beyond where exponentials end, infinite and NaN ones; ups that clip."""
    x = normal(rows, 3, 2 * cols) * 4
    wild = torch.tensor(
        [-1e4, -100.0, -88.0, -87.5, 88.0, 88.7, 1e4, torch.inf, -torch.inf, torch.nan]
    )
    x[0, 0, : len(wild)] = wild
    x[0, 1, cols : cols + 5] = torch.tensor([torch.inf, -torch.inf, -0.0, 1e-40, 3e38])
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fmt", [INT8, INT8_MIN128, FP8_E4M3], ids=lambda f: f.name)
def test_swiglu_and_its_codes_equal_the_cpus(fmt, dtype, launched):
    """The C++ library's exponential, which torch's is not to the last bit."""
    from mqat.kernels.cpu import passes as cpu

    assert cpu.library() is not None
    x, scale = gates_and_ups(7, 264, dtype), torch.tensor([0.05])
    clean = x.clone()
    clean[0] = 1.0
    assert_same([passes.swiglu(x)], [cpu.swiglu(x)])
    torch.testing.assert_close(passes.swiglu(clean), reference.swiglu(clean), rtol=2**-7, atol=0)
    for given in (x, clean):
        codes = passes.swiglu_encode(given, scale, fmt.name, None, True)
        assert_same(codes[1:], cpu.swiglu_encode(given, scale, fmt.name, None, True)[1:])
        assert bool(codes[1].isnan()) == (given is x)
    both_ways = [
        codes,
        cpu.swiglu_encode(clean, scale, fmt.name, None, True),
        passes.encode(passes.swiglu(clean), scale, None, fmt.name, "tensor", None, True),
    ]
    for other in both_ways[1:]:
        assert_same(codes, other)
    assert bool((codes[2] != 255).any())  # control: masks are not all ones
    grad = normal(7, 3, 264, seed=2).to(dtype)
    masked = grad.clone()
    passes.apply_mask_(masked, codes[2], None)
    for given, mask, upstream in ((x, None, grad), (clean, codes[2], masked)):
        dx = passes.swiglu_backward(grad, given, mask)
        assert_same([dx], [cpu.swiglu_backward(grad, given, mask)])
        assert_same([dx], [passes.swiglu_backward(upstream, given, None)])
    assert not torch.equal(dx, passes.swiglu_backward(grad, clean, None))  # control
    kernels = {"swiglu", "swiglu_encode", "encode", "apply_mask", "swiglu_backward"}
    assert set(launched) == kernels


def test_swiglu_of_other_widths_is_the_references(launched):
    x = normal(5, 36)  # 18 columns: rows share bytes of the mask
    assert_same(*both("swiglu", x))
    assert_same(*both("swiglu_encode", x, torch.tensor([0.05]), "int8", None, True))
    mask = reference.pack_mask(torch.rand(5, 18) > 0.3)
    assert_same(*both("swiglu_backward", normal(5, 18), x, mask))
    assert set(launched) == {"encode"}


def codes(*shape, seed=0):
    return torch.randint(
        -128, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed)
    )


@pytest.mark.parametrize(
    ("rows", "inner", "cols"),
    [(1, 1, 1), (5, 33, 7), (17, 128, 24), (65, 300, 136), (130, 1056, 129)],
)
def test_the_integer_gemm_takes_any_shape(rows, inner, cols):
    x, w = codes(rows, inner), codes(cols, inner, seed=1)
    by_row, by_col = steps(x, PerChannel()) * 1e-3, steps(w, PerChannel())
    for by_column, by_token, dtype in (
        (by_col[:1], None, torch.float32),
        (by_col, by_row, torch.bfloat16),
        (by_col.bfloat16(), None, torch.float16),
    ):
        assert_same(*both("scaled_matmul", x, w, by_column, by_token, dtype))


def test_the_largest_sums_in_the_largest_tiles(monkeypatch):
    x = torch.full((130, 1100), -128, dtype=torch.int8)
    w = torch.full((300, 1100), -128, dtype=torch.int8)
    x[:, :3], w[:, :5] = 1, 3
    tiles = passes._tiles(1024, 2048, x.device)
    assert tiles["tile_cols"] == 256
    monkeypatch.setattr(passes, "_tiles", lambda *_: tiles)
    assert_same(*both("scaled_matmul", x, w, torch.ones(1), None, torch.float32))


def test_the_integer_gemm_reads_other_layouts_and_marks_nan():
    x, w = codes(96, 40).t(), codes(96, 24, seed=1).t()
    assert not (x.is_contiguous() or w.is_contiguous())
    assert_same(*both("scaled_matmul", x, w, torch.rand(24), torch.rand(40), torch.float32))
    found, _ = both("scaled_matmul", x, w, torch.tensor([float("nan")]), None, torch.float32)
    assert bool(found[0].isnan().all())


def test_what_the_kernels_do_not_serve_is_the_references(launched):
    x = normal(16, 36)
    cases = [
        (x.double(), INT8, PerTensor()),
        (x.t(), INT8, PerChannel()),
        (x, INT8, PerGroup(16)),  # the last group is short
        (x, INT4, PerChannel()),  # 36 is no multiple of 8
        (x, INT8, PerBlock(8)),
        (x[:0], INT8, PerTensor()),
    ]
    for operand, fmt, granularity in cases:
        scale = torch.full(granularity.scale_shape(tuple(operand.shape)), 0.01)
        names = fmt.name, str(granularity)
        found, expected = both("encode", operand, scale, None, *names, None, True)
        assert_same(found, expected)
        assert_same(*both("fake_quantize_with_mask", operand, scale, *names, None))
        if operand.numel():
            assert_same(*both("decode", found[0], scale, None, names[1], torch.float64))
    assert_same(*both("fake_quantize_with_mask", x, torch.ones(1), NF4.name, "tensor", None))
    assert_same(*both("apply_mask_", x.t(), None, torch.tensor([0.5])))
    assert not launched


def test_scales_of_another_dtype_or_layout_are_read_as_torch_reads_them(launched):
    x = normal(64, 64) * 3
    cast = (PerChannel().largest(x.abs()) / 127).bfloat16()
    for scale in (cast, torch.tensor([0.05]).expand(64)):
        found, expected = both("encode", x, scale, None, INT8.name, "channel", None, True)
        assert_same(found, expected)
    assert launched == ["encode"] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["stochastic_rows", "stochastic_columns"])
@pytest.mark.parametrize("fmt", [INT8, FP8_E4M3], ids=lambda f: f.name)
def test_gradients_rounded_up_or_down(fmt, name, dtype):
    x = normal(70, 130).to(dtype)
    x[1], x[:, 2] = 0.0, -0.0
    x[3] *= 1e-3  # subnormal E4M3 numbers of columns
    x[4, ::2] *= 1e-4
    x[5, 6], x[7, 8] = torch.nan, torch.inf
    columns = torch.arange(130, dtype=torch.int32) + 1000
    factor = normal(130 if name == "stochastic_rows" else 70, seed=1).abs()
    for by, seed in ((None, 1), (factor, 2**32 - 5), (factor, 12345)):
        found, expected = both(name, x, by, columns, fmt.name, seed)
        assert_same(found[1:], expected[1:])
        assert int(found[1].isnan().sum()) == 1
        finite = found[1].isfinite()
        codes = [side[0][finite].view(torch.uint8) for side in (found, expected)]
        assert torch.equal(*codes)
    other = both(name, x, factor, columns, fmt.name, 7)[0][0]
    assert not torch.equal(other.view(torch.uint8), found[0].view(torch.uint8))

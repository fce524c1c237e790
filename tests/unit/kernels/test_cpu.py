"""The CPU kernels against torch's operations: the same bits."""

import pytest
import torch

from mqat.kernels.cpu import passes as native
from mqat.kernels.cpu.build import library
from mqat.kernels.gemm import decode, int8_matmul, scaled_matmul
from mqat.kernels.operands import (
    apply_mask_,
    decode_scaled,
    dequantized_with_mask,
    encode,
    pack_mask,
)
from mqat.quant.formats import FP8_E4M3, INT4, INT4_AMAX7_5, INT8, INT8_MIN128
from mqat.quant.granularity import PerChannel, PerGroup, PerTensor, PerToken
from mqat.quant.scales import compute_affine, compute_range

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler here")


def both(function):
    """What `function` returns with the kernels, and with torch."""
    found = []
    for is_on in (True, False):
        native.set_enabled(is_on)
        try:
            found.append(function())
        finally:
            native.set_enabled(True)
    return found


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), PerGroup(128)], ids=str)
@pytest.mark.parametrize(
    "fmt", [INT8, INT8_MIN128, INT4, INT4_AMAX7_5, FP8_E4M3], ids=lambda f: f.name
)
def test_codes_masks_and_values_are_the_same_bits(fmt, granularity, dtype):
    x = (torch.randn(600, 512, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    x[0] = torch.linspace(-1, 1, 512) * 0.01  # subnormal E4M3 numbers, and ties
    x[1, :3] = torch.tensor([float("inf"), -float("inf"), -0.0])
    scale = granularity.largest(x.float().clamp(-9, 9).abs()) / fmt.max_value * 0.5

    def encoded(ste_clip_range):
        e = encode(x, scale, fmt, granularity, with_mask=True, ste_clip_range=ste_clip_range)
        return e.codes.view(torch.uint8), e.mask, e.scale

    def decoded():
        codes = encode(x, scale, fmt, granularity, with_mask=False).codes
        return decode(codes, dtype), decode_scaled(codes, scale, granularity, dtype)

    for ste_clip_range in (None, 8.5):
        (found, expected) = both(lambda ste_clip_range=ste_clip_range: encoded(ste_clip_range))
        assert_same(found, expected)
        if not fmt.is_float:
            assert_same(
                *both(
                    lambda r=ste_clip_range: dequantized_with_mask(
                        x, scale, fmt, granularity, ste_clip_range=r
                    )
                )
            )
    assert_same(*both(decoded))
    assert bool((found[1] != 255).any())  # control: masks are not all ones


def test_tokens_with_zero_points_are_the_same_bits():
    x = torch.randn(9, 3, 64, generator=torch.Generator().manual_seed(0)) + 0.3
    scale, zero = compute_affine(compute_range(x, PerToken()), INT8_MIN128)
    assert bool((zero != 0).any())

    def codes_and_values():
        e = encode(x, scale, INT8_MIN128, PerToken(), with_mask=False, zero_point=zero)
        return e.codes, decode_scaled(e.codes, scale, PerToken(), torch.float32, zero)

    assert_same(*both(codes_and_values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_row", [False, True])
def test_scaled_products_and_masked_gradients_are_the_same_bits(dtype, per_row):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-128, 128, (17, 64), dtype=torch.int8, generator=generator)
    w = torch.randint(-127, 128, (24, 64), dtype=torch.int8, generator=generator)
    col, row = torch.rand(24, generator=generator), torch.rand(17, generator=generator)
    steps = row if per_row else None
    assert_same(*both(lambda: [scaled_matmul(x, w, col, dtype, row_scale=steps)]))
    dw = torch.randn(24, 64, generator=generator).to(dtype)
    mask = pack_mask(torch.rand(24, 64, generator=generator) > 0.1)
    found, expected = both(lambda: apply_mask_(dw.clone(), mask))
    assert torch.equal(found, expected) and bool((found == 0).any())
    total = torch.ones(24, 64)
    native.accumulate_(total, dw, mask, torch.tensor([0.5]))
    assert torch.equal(total, 1 + expected.float() * 0.5)
    assert int8_matmul(x, w).shape == (17, 24)


def test_several_threads_give_the_same_bits():
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    scale, threads = torch.tensor([0.01]), torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        e = encode(x, scale, INT8_MIN128, PerTensor(), with_mask=True)
        results.append((e.codes, e.mask, native.swiglu(x), *native.rms_norm(x, x[0], 1e-5)))
    torch.set_num_threads(threads)
    assert_same(*results)


def test_steps_of_another_dtype_or_layout_are_read_as_torch_reads_them():
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * 3
    cast = (PerChannel().largest(x.abs()) / 127).bfloat16()
    expanded = torch.tensor([0.05]).expand(64)
    for scale in (cast, expanded):
        found, expected = both(
            lambda scale=scale: [encode(x, scale, INT8, PerChannel(), with_mask=True).codes]
        )
        assert_same(found, expected)
    assert not torch.equal(found[0], encode(x, cast, INT8, PerChannel(), with_mask=True).codes)


def test_nothing_is_encoded_decoded_and_multiplied():
    empty = torch.empty(0, 16, dtype=torch.float8_e4m3fn)
    assert decode(empty, torch.float32).shape == (0, 16)
    weight = torch.ones(8, 16).to(torch.float8_e4m3fn)
    assert scaled_matmul(empty, weight, torch.ones(1), torch.float32).shape == (0, 8)


def test_rows_wider_than_a_piece_are_taken_whole():
    x = torch.randn(16, 53248, generator=torch.Generator().manual_seed(0))
    found, expected = both(
        lambda: [encode(x, torch.tensor([0.05]), INT8, PerTensor(), with_mask=True).mask]
    )
    assert_same(found, expected)


def test_tensors_are_made_where_the_operand_is():
    x = torch.randn(4, 64)
    with torch.device("meta"):
        found = native.swiglu(x)
    assert found.device.type == "cpu"


def test_a_home_that_cannot_be_written_to_is_no_obstacle(monkeypatch):
    from mqat.kernels.cpu import build

    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    directory = build._cache_directory()
    (directory / "probe").write_text("written")

"""Stored weights against the plain arithmetic that they replace."""

import pytest
import torch

from mqat.kernels.packed_int4 import KERNEL_ROWS, PackedInt4, pack_for_kernel
from mqat.kernels.packed_int8 import Int8Codes, Int8Product
from mqat.kernels.packed_weight import DecodedCodes, pack_weight, packed_matmul
from mqat.quant.algorithm import ALGORITHMS, named_scheme
from mqat.quant.formats import INT4, INT4_AMAX7_5, INT8, INT8_MIN128, UINT4
from mqat.quant.functional import fake_quantize, quantize
from mqat.quant.granularity import PerChannel, PerGroup, PerTensor
from mqat.quant.qparams import compute_qparams, statistic_of
from mqat.quant.scheme import LinearScheme, TensorScheme

SHAPE = (72, 200)  # neither whole blocks of rows nor whole groups


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lowered(scheme, shape=SHAPE):
    """A weight on the scheme's grid and its stored form."""
    w = drawn(*shape)
    operand = scheme.weight
    above = statistic_of(w, operand).amax().reshape(1) / 2688 if operand.has_global_scale else None
    scale, zero_point = compute_qparams(statistic_of(w, operand), operand, above)
    values = fake_quantize(w, scale, operand.format, operand.granularity, zero_point=zero_point)
    return values, pack_weight(w, scale, scheme, zero_point)


def grouped(fmt, size, *, scale_dtype=torch.bfloat16):
    return LinearScheme(
        "x",
        TensorScheme(fmt, PerGroup(size), scale_dtype, is_asymmetric=fmt == UINT4),
        None,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [32, 64, 128, 256])
@pytest.mark.parametrize("fmt", [INT4, INT4_AMAX7_5, UINT4], ids=lambda fmt: fmt.name)
def test_packed_int4_decodes_to_the_fake_quantized_weight(fmt, size, dtype):
    values, weight = lowered(grouped(fmt, size))
    assert isinstance(weight.storage, PackedInt4)
    decoded = weight.storage.decode(dtype)
    assert torch.equal(decoded, values.to(dtype))
    other, _ = lowered(grouped(fmt, 16))
    assert not torch.equal(decoded, other.to(dtype))  # control


@pytest.mark.parametrize("rows", [1, KERNEL_ROWS, KERNEL_ROWS + 1])
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("fmt", [INT4, UINT4], ids=lambda fmt: fmt.name)
def test_int4_products_equal_the_fake_quantized_ones(fmt, scale_dtype, rows):
    values, weight = lowered(grouped(fmt, 64, scale_dtype=scale_dtype))
    x = drawn(rows, SHAPE[1], seed=1).bfloat16()
    exact = x.float() @ values.t()
    found = packed_matmul(x, None, weight).float()
    # bfloat16 rounds results (decoded weights and zero points too, where they are used) to 8 bits
    assert float((found - exact).norm() / exact.norm()) < 2.0**-7
    assert float((x.float() @ drawn(*SHAPE).t() - exact).norm() / exact.norm()) > 0.05  # control
    # Offsets of zero points, (8 - zero) * scale, seldom lie on bfloat16's grid; scales may.
    is_on_grid = scale_dtype == torch.bfloat16 and fmt == INT4
    assert len(weight.storage.pairs) == (1 if is_on_grid else 2)
    assert found.is_contiguous()  # an all-reduce writes to it


def test_the_second_pass_of_the_kernel_makes_up_for_bfloat16_scales():
    _, weight = lowered(grouped(INT4, 64, scale_dtype=torch.float32))
    storage = weight.storage
    x = torch.eye(SHAPE[1])[:KERNEL_ROWS].bfloat16()
    exact = storage.decode(torch.float32).t()[:KERNEL_ROWS]
    both = storage.multiply(x).float()
    one = PackedInt4(
        storage.packed, storage.scale, storage.zero, storage.pairs[:1], 64, storage.half, SHAPE
    ).multiply(x)  # fmt: skip
    assert float((both - exact).abs().mean()) < float((one.float() - exact).abs().mean())


def test_half_a_byte_is_all_that_int4_weights_take():
    _, weight = lowered(named_scheme("int4"), (128, 1024))
    # scales: 2 bytes to decode with and 4 in the kernel's pairs, for each group of 128
    assert weight.num_bytes == 128 * 1024 * (0.5 + 6 / 128)


def test_codes_that_do_not_read_back_are_not_packed():
    codes = torch.zeros(64, 64, dtype=torch.int8)
    assert pack_for_kernel(codes, torch.ones(64, 2), None, INT4, 32) is not None
    assert pack_for_kernel(codes, torch.ones(64, 4), None, INT4, 16) is None
    assert pack_for_kernel(codes, torch.ones(64, 2), None, INT8, 32) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("algorithm", ["int8", "int8_pc_pt"])
def test_int8_products_are_those_of_the_codes(algorithm, dtype):
    scheme = named_scheme(algorithm)
    w, x = drawn(*SHAPE), drawn(17, SHAPE[1], seed=1).to(dtype)
    w_scale, _ = compute_qparams(statistic_of(w, scheme.weight), scheme.weight)
    x_scale, _ = compute_qparams(statistic_of(x, scheme.input), scheme.input)
    x_scale = x_scale * 0.5  # some values are clipped
    weight = pack_weight(w, w_scale, scheme)
    assert isinstance(weight.storage, Int8Product)
    found = packed_matmul(x, (x_scale, None), weight)
    operand = scheme.input
    x_codes = quantize(x, x_scale, operand.format, operand.granularity)
    w_codes = quantize(w, w_scale, INT8, PerChannel())
    whole = (x_codes.double() @ w_codes.double().t()) * w_scale * x_scale.reshape(-1, 1)
    # float32 scales the exact integers, then one rounding to dtype
    assert float((found - whole).norm() / whole.norm()) < (1e-6 if dtype == torch.float32 else 3e-3)
    assert float((x.double() @ w.double().t() - whole).norm() / whole.norm()) > 5e-3  # control


def test_plain_int8_codes_give_what_packed_ones_do():
    """What machines without VNNI run."""
    codes = quantize(drawn(*SHAPE), torch.full((72,), 0.03), INT8, PerChannel())
    scale = drawn(72).abs() + 0.01
    x = drawn(17, SHAPE[1], seed=1)
    for x_scale in (torch.tensor([0.02]), drawn(17).abs() + 0.01):
        packed = Int8Product.of(codes, scale, INT8_MIN128).multiply(x, x_scale)
        plain = Int8Product(codes, scale, None, INT8_MIN128).multiply(x, x_scale)
        torch.testing.assert_close(packed, plain, rtol=1e-6, atol=1e-6)
        assert not torch.allclose(
            packed, Int8Product.of(codes, scale, INT8_MIN128).multiply(x, x_scale * 2)
        )


def test_nan_comes_out_of_integer_products():
    weight = Int8Product.of(torch.ones(8, 16, dtype=torch.int8), torch.ones(8), INT8_MIN128)
    x = torch.ones(2, 16)
    assert weight.multiply(x, torch.ones(1)).isfinite().all()
    x[0, 3] = torch.nan
    assert weight.multiply(x, torch.ones(1)).isnan().all()


@pytest.mark.parametrize("shape", [SHAPE, (72, 256)])  # for torch's kernel the first is too narrow
@pytest.mark.parametrize("rows", [1, 33])
def test_int8_weights_multiply_floats(rows, shape):
    values, weight = lowered(named_scheme("int8_wo"), shape)
    assert isinstance(weight.storage, Int8Codes)
    x = drawn(rows, shape[1], seed=1)
    exact = x @ values.t()
    torch.testing.assert_close(packed_matmul(x, None, weight), exact, rtol=1e-5, atol=1e-4)
    half = packed_matmul(x.bfloat16(), None, weight).float()
    # two roundings to 8 bits: the sum and the scaled sum
    assert float((half - exact).norm() / exact.norm()) < 2.0**-7
    assert not torch.allclose(x @ drawn(*shape).t(), exact, rtol=1e-5, atol=1e-4)  # control


@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name != "null"])
def test_every_scheme_is_served_and_decodes_to_its_own_grid(algorithm):
    scheme = named_scheme(algorithm)
    values, weight = lowered(scheme)
    assert weight.num_bytes < 0.36 * 4 * SHAPE[0] * SHAPE[1]
    if isinstance(weight.storage, DecodedCodes):
        assert torch.equal(weight.storage.decode(torch.float32), values)
        assert torch.equal(weight.storage.decode(torch.bfloat16), values.bfloat16())
    known = {DecodedCodes: ("nvfp4", "mxfp4", "mxfp8", "nf4", "fp8_pc_pt")}
    assert isinstance(weight.storage, DecodedCodes) == (algorithm in known[DecodedCodes])


def test_a_per_tensor_integer_of_few_bits_is_decoded():
    scheme = LinearScheme("x", TensorScheme(INT4, PerTensor()), None)
    values, weight = lowered(scheme)
    assert torch.equal(weight.storage.decode(torch.float32), values)
    assert weight.num_bytes <= SHAPE[0] * SHAPE[1] / 2 + 4


@pytest.mark.parametrize("fmt", [INT8, INT8_MIN128], ids=lambda fmt: fmt.name)
def test_inputs_saturate_where_their_format_ends(fmt):
    scheme = LinearScheme("x", TensorScheme(INT8, PerChannel()), TensorScheme(fmt, PerTensor()))
    values, weight = lowered(scheme)
    assert isinstance(weight.storage, Int8Product)
    x = torch.full((17, SHAPE[1]), -100.0)
    found = packed_matmul(x, (torch.tensor([0.1]), None), weight)
    torch.testing.assert_close(found, 0.1 * fmt.qmin * values.sum(dim=1).expand(17, -1))

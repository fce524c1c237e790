"""Operators as torch sees them, and the CPU's against the reference: the same bits."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mqat.kernels import operators, reference
from mqat.kernels.operators import scaled_matmul
from mqat.quant.formats import FP8_E4M3, INT4, INT4_AMAX7_5, INT8, INT8_MIN128, TERNARY
from mqat.quant.granularity import PerBlock, PerChannel, PerGroup, PerTensor, PerToken
from mqat.quant.scales import compute_affine, compute_range

FORMATS = (INT8, INT8_MIN128, INT4, INT4_AMAX7_5, TERNARY, FP8_E4M3)
NAMES = {n for n in dir(torch.ops.mqat) if hasattr(reference, n) and not n.startswith("__")}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def both(name, *arguments):
    """What the operator returns, or has written to its first argument, and what the reference does."""
    found = []
    for function in (getattr(torch.ops.mqat, name).default, getattr(reference, name)):
        copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]
        results = function(*copies)
        results = (copies[0],) if results is None else results
        results = (results,) if isinstance(results, torch.Tensor) else results
        found.append([x.view(torch.uint8) if x.element_size() == 1 else x for x in results])
    return found


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def scale_of(x, fmt, granularity):
    """Half of what would not clip."""
    return granularity.largest(x.float().clamp(-9, 9).abs()) / fmt.max_value * 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), PerGroup(128)], ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_codes_masks_and_values_are_the_same_bits(fmt, granularity, dtype):
    x = (normal(600, 512) * 3).to(dtype)
    x[0] = torch.linspace(-1, 1, 512) * 0.01  # subnormal E4M3 numbers, and ties
    x[1, :3] = torch.tensor([float("inf"), -float("inf"), -0.0])
    scale, names = scale_of(x, fmt, granularity), (fmt.name, str(granularity))
    for ste_clip_range in (None, 8.5):
        found, expected = both("encode", x, scale, None, *names, ste_clip_range, True)
        assert_same(found, expected)
        assert bool((found[2] != 255).any())  # control: masks are not all ones
        assert_same(*both("fake_quantize_with_mask", x, scale, *names, ste_clip_range))
        assert_same(*both("fake_quantize_with_mask", x, scale, *names, ste_clip_range, False))
    codes = found[0].view(fmt.storage_dtype)
    assert_same(*both("decode", codes, scale, None, names[1], dtype))
    assert_same(*both("decode", codes, None, None, names[1], dtype))
    x[2, 2] = float("nan")
    found, expected = both("encode", x, scale, None, *names, None, False)
    assert bool(found[1].isnan().all() & expected[1].isnan().all())


def test_tokens_with_zero_points_are_the_same_bits():
    x = normal(9, 3, 64) + 0.3
    scale, zero = compute_affine(compute_range(x, PerToken()), INT8_MIN128)
    assert bool((zero != 0).any())
    found, expected = both("encode", x, scale, zero, INT8_MIN128.name, "token", None, False)
    assert_same(found, expected)
    codes = found[0].view(torch.int8)
    assert_same(*both("decode", codes, scale, zero, "token", torch.float32))


# Of 2 blocks in a row and some, of one, and where a byte of the mask belongs to two rows.
@pytest.mark.parametrize("cols", [2056, 64, 36])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fmt", [INT8, INT8_MIN128, FP8_E4M3], ids=lambda f: f.name)
def test_codes_out_of_swiglu_are_those_of_its_values(backend, fmt, dtype, cols):
    x, grad = (normal(10, 4, 2 * cols) * 4).to(dtype), normal(10, 4, cols, seed=1).to(dtype)
    x[0, 0, :2] = torch.tensor([float("inf"), -0.0])
    scale = torch.tensor([0.05])
    values = operators.swiglu(x)
    for ste_clip_range in (None, 4.0, float("inf")):
        found = operators.swiglu_encode(
            x, scale, fmt, with_mask=True, ste_clip_range=ste_clip_range
        )
        expected = operators.encode(
            values, scale, fmt, PerTensor(), with_mask=True, ste_clip_range=ste_clip_range
        )
        assert_same([found.codes.view(torch.uint8)], [expected.codes.view(torch.uint8)])
        assert_same([found.scale, found.mask], [expected.scale, expected.mask])
        assert bool((found.mask[: cols // 8] != 255).any()) == (ste_clip_range != float("inf"))
        masked = grad.clone()
        operators.apply_mask_(masked, found.mask, None)
        dx = operators.swiglu_backward(grad, x, found.mask)
        assert_same([dx], [operators.swiglu_backward(masked, x, None)])
        unmasked = operators.swiglu_backward(grad, x, None)
        assert torch.equal(dx[1:], unmasked[1:]) == (ste_clip_range == float("inf"))  # control
    assert operators.swiglu_encode(x, scale, fmt, with_mask=False).mask is None
    x[3, 1, 5] = float("nan")
    marked = operators.swiglu_encode(x, scale, fmt, with_mask=False).scale
    assert bool(marked.isnan().all()) and bool(found.scale.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_row", [False, True])
def test_scaled_products_and_masked_gradients_are_the_same_bits(dtype, per_row):
    generator = torch.Generator().manual_seed(0)
    product = torch.randint(-(2**23), 2**23, (17, 24), dtype=torch.int32, generator=generator)
    col, row = torch.rand(24, generator=generator), torch.rand(17, generator=generator)
    for kind in (torch.int32, torch.float32, torch.bfloat16):
        arguments = (product.to(kind), col, row if per_row else None, dtype)
        assert_same(*both("scale_product", *arguments))
    dw = normal(24, 64).to(dtype)
    mask = reference.pack_mask(torch.rand(24, 64, generator=generator) > 0.1)
    scale = torch.tensor([0.3]) if per_row else None
    for bits in (mask, None):
        assert_same(*both("apply_mask_", dw, bits, scale))
        assert_same(*both("accumulate_", normal(24, 64, seed=1), dw, bits, scale))
    outside = reference.unpack_mask(mask, (24, 64)) == 0
    dw[outside] = (
        torch.tensor([float("nan"), float("inf")]).repeat(24 * 64)[: int(outside.sum())].to(dtype)
    )
    assert_same(*both("accumulate_", normal(24, 64, seed=1), dw, mask, scale))
    assert_same(*both("apply_mask_", dw, mask, scale))
    assert torch.equal(both("apply_mask_", dw, mask, scale)[1][0] == 0, outside)
    masked = both("apply_mask_", dw, mask, scale)[0][0]
    assert bool((masked == 0).any()) and bool((masked != 0).any())


def test_what_the_library_does_not_serve_is_the_references():
    x = normal(16, 36)
    cases = [
        (x.double(), INT8, PerTensor()),
        (x.t(), INT8, PerChannel()),
        (x, INT8, PerGroup(16)),  # the last group is short
        (x, INT4, PerChannel()),  # 36 is no multiple of 8
        (x, INT8, PerBlock(8)),
        (x[:0], INT8, PerTensor()),
    ]
    for x, fmt, granularity in cases:
        scale = torch.full(granularity.scale_shape(tuple(x.shape)), 0.01)
        found, expected = both("encode", x, scale, None, fmt.name, str(granularity), None, True)
        assert_same(found, expected)
        codes = found[0].view(torch.int8)
        assert_same(*both("decode", codes, scale, None, str(granularity), torch.float32))


def test_several_threads_give_the_same_bits():
    x = normal(64, 512).bfloat16()
    scale, threads = torch.tensor([0.01]), torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        e = operators.encode(x, scale, INT8_MIN128, PerTensor(), with_mask=True)
        norm = operators.rms_norm(x, x[0], 1e-5)
        gated = operators.swiglu_encode(x, scale, INT8_MIN128, with_mask=True)
        dx = operators.swiglu_backward(x[:, :256].contiguous(), x, gated.mask)
        values = (operators.swiglu(x), gated.codes, gated.mask, dx)
        results.append((e.codes, e.mask, *values, *norm))
    torch.set_num_threads(threads)
    assert_same(*results)


def test_scales_of_another_dtype_or_layout_are_read_as_torch_reads_them():
    x = normal(64, 64) * 3
    cast = (PerChannel().largest(x.abs()) / 127).bfloat16()
    expanded = torch.tensor([0.05]).expand(64)
    codes = []
    for scale in (cast, expanded):
        found, expected = both("encode", x, scale, None, INT8.name, "channel", None, True)
        assert_same(found, expected)
        codes.append(found[0])
    assert not torch.equal(*codes)


def test_nothing_is_encoded_decoded_and_multiplied(backend):
    empty = torch.empty(0, 16, dtype=torch.float8_e4m3fn)
    assert operators.decode(empty, torch.float32).shape == (0, 16)
    weight = torch.ones(8, 16).to(torch.float8_e4m3fn)
    assert scaled_matmul(empty, weight, torch.ones(1), torch.float32).shape == (0, 8)


def test_rows_wider_than_what_is_cached_are_taken_whole():
    x = normal(16, 53248)
    assert_same(*both("encode", x, torch.tensor([0.05]), None, "int8", "tensor", None, True))


def test_tensors_are_made_where_the_operand_is(backend):
    x = torch.randn(4, 64)
    with torch.device("meta"):
        found = operators.swiglu(x)
    assert found.device.type == "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["int8", "fp8_e4m3"])
@pytest.mark.parametrize("by", ["rows", "columns"])
def test_stochastic_codes_are_the_same_bits(by, name, dtype):
    x = normal(130, 264) * torch.logspace(-6, 0, 130)[:, None]
    x[3], x[:, 5] = 0, 0
    x[4], x[:, 6] = 2.0**-140, 2.0**-140  # a scale cannot be that small
    x[7, 9] = 3e38
    columns = torch.arange(264, dtype=torch.int32) + 7
    for factor in (None, torch.linspace(0.1, 2, 264 if by == "rows" else 130)):
        found, expected = both(f"stochastic_{by}", x.to(dtype), factor, columns, name, 2**32 - 3)
        assert_same(found, expected)
    codes, scale = getattr(operators, f"stochastic_{by}")(x.to(dtype), None, columns, name, 1)
    values = codes.float() * scale[:, None]
    values, step = (values, scale[:, None]) if by == "rows" else (values.t(), scale)
    step = step if name == "int8" else torch.maximum(x.abs() / 8, step / 512)  # to the next number
    assert bool(((values - x.to(dtype).float()).abs() <= step * 1.001).all())
    x[2, 2], x[9, 9] = float("nan"), float("inf")
    for part in both(f"stochastic_{by}", x.to(dtype), None, columns, name, 1):
        assert part[1].isfinite().logical_not().nonzero().flatten().tolist() == [2, 9]


@pytest.mark.parametrize("name", ["int8", "fp8_e4m3"])
def test_stochastic_rounding_is_unbiased_and_leaves_the_grid_alone(name):
    columns = torch.arange(256, dtype=torch.int32)
    x, draws = normal(64, 256), 400
    total = torch.zeros_like(x)
    for seed in range(draws):
        codes, scale = operators.stochastic_rows(x, None, columns, name, seed * 0x9E3779B1 % 2**32)
        values = codes.float() * scale[:, None]
        total += values - x
    noise = (values - x).square().mean().sqrt()
    assert float(noise) > 1e-3  # control
    assert float((total / draws).square().mean().sqrt()) < 1.2 * float(noise) / draws**0.5
    assert abs(float(total.mean())) < 4 * float(noise) * (draws / x.numel()) ** 0.5
    again, same = operators.stochastic_rows(values, None, columns, name, 1)
    torch.testing.assert_close(again.float() * same[:, None], values, rtol=1e-6, atol=0)


def test_noise_belongs_to_an_elements_place_in_the_whole_matrix():
    x, columns = normal(32, 64).clamp(-3, 3), torch.arange(64, dtype=torch.int32)
    x[:, 0] = x[:, 32] = 4.0  # the same scale in either half
    whole, _ = operators.stochastic_rows(x, None, columns, "int8", 5)
    half, _ = operators.stochastic_rows(x[:, 32:].contiguous(), None, columns[32:], "int8", 5)
    assert torch.equal(half, whole[:, 32:])
    other, _ = operators.stochastic_rows(x[:, 32:].contiguous(), None, columns[:32], "int8", 5)
    assert not torch.equal(other, whole[:, 32:])  # control
    whole, _ = operators.stochastic_columns(x, None, columns, "int8", 5)
    half, _ = operators.stochastic_columns(x[:, 32:].contiguous(), None, columns[32:], "int8", 5)
    assert torch.equal(half, whole[32:])


def calls(dtype=torch.bfloat16):
    """Name and arguments of one call of every operator, with and without what is optional."""
    x, weight, scale = normal(8, 3, 32).to(dtype), normal(32).to(dtype), torch.tensor([0.02])
    codes = torch.ones(8, 32, dtype=torch.int8)
    mask = torch.full((96,), 0x5A, dtype=torch.uint8)
    product = torch.ones(8, 16, dtype=torch.int32)
    zero = torch.full((8, 3), 3, dtype=torch.int32)
    columns = torch.arange(32, dtype=torch.int32)
    fp8 = codes.float().to(torch.float8_e4m3fn)
    return [
        ("encode", (x, scale, None, "int8", "tensor", None, True)),
        ("encode", (x, scale, None, "fp8_e4m3", "tensor", 4.0, False)),
        ("encode", (x, scale.expand(8, 3), zero, "int8_full", "token", None, False)),
        ("fake_quantize_with_mask", (x[0], scale.expand(3, 2), "int4", "group:16", None)),
        ("decode", (codes, scale.expand(8), None, "channel", dtype)),
        ("decode", (fp8, None, None, "tensor", torch.float32)),
        ("scaled_matmul", (codes, codes, scale, None, dtype)),
        ("scaled_matmul", (fp8, fp8, scale.expand(8), torch.ones(8), torch.float32)),
        ("scale_product", (product, scale, None, dtype)),
        ("scale_product", (product, scale.expand(16), torch.ones(8), torch.float32)),
        ("apply_mask_", (x.clone(), mask, scale)),
        ("apply_mask_", (x.clone(), None, scale)),
        ("accumulate_", (x.float(), x, mask, None)),
        ("stochastic_rows", (x[0], None, columns, "int8", 7)),
        ("stochastic_rows", (x[0], weight.float(), columns, "fp8_e4m3", 7)),
        ("stochastic_columns", (x[0], None, columns, "int8", 7)),
        ("stochastic_columns", (x[0], torch.ones(3), columns, "fp8_e4m3", 7)),
        ("stochastic_columns", (x[0], None, columns, "fp8_e4m3", 2**32 - 1)),
        ("rms_norm", (x, weight, 1e-5)),
        ("rms_norm_backward", (x, x, weight, torch.ones(8, 3))),
        ("swiglu", (x,)),
        ("swiglu_encode", (x, scale, "int8", None, True)),
        ("swiglu_encode", (x, scale, "fp8_e4m3", 4.0, False)),
        ("swiglu_backward", (x[..., :16].contiguous(), x, None)),
        ("swiglu_backward", (x[..., :16].contiguous(), x, mask[:48])),
    ]


def test_every_operator_is_called():
    assert {name for name, _ in calls()} == NAMES


@pytest.mark.parametrize(("name", "arguments"), calls(), ids=lambda x: x if type(x) is str else "")
def test_fake_tensors_come_out_like_real_ones(name, arguments):
    operator = getattr(torch.ops.mqat, name).default
    real = operator(*arguments)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments]
        fake = operator(*fakes)
    if real is None:
        assert fake is None
        return
    pairs = [(fake, real)] if isinstance(real, torch.Tensor) else zip(fake, real, strict=True)
    for a, b in pairs:
        assert isinstance(a, torch._subclasses.FakeTensor) and a.device == b.device
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.mark.parametrize(("name", "arguments"), calls(), ids=lambda x: x if type(x) is str else "")
def test_on_cuda_fake_tensors_are_one_operator_each_and_stay_there(name, arguments):
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.name())
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    with FakeTensorMode():
        fakes = [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
            if isinstance(x, torch.Tensor)
            else x
            for x in arguments
        ]
        with Seen():
            results = getattr(torch.ops.mqat, name).default(*fakes)
    assert names == [f"mqat::{name}"]
    for x in results if isinstance(results, tuple) else (results,):
        assert x is None or x.device.type == "cuda"


@pytest.mark.parametrize(("name", "arguments"), calls(), ids=lambda x: x if type(x) is str else "")
def test_torch_finds_nothing_wrong_with_the_registration(name, arguments):
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if all(getattr(x, "dtype", None) != torch.float8_e4m3fn for x in arguments):
        checks.append("test_schema")  # multiplies its inputs, which torch cannot do with float8
    torch.library.opcheck(getattr(torch.ops.mqat, name).default, arguments, test_utils=checks)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("fmt", [INT8, FP8_E4M3], ids=lambda f: f.name)
def test_a_quantized_product_compiles_to_one_graph(fmt, compiler):
    def product(x, w, scale):
        a = operators.encode(x, scale, fmt, PerTensor(), with_mask=True)
        b = operators.encode(w, scale.expand(24), fmt, PerChannel(), with_mask=False)
        y = scaled_matmul(a.codes, b.codes, a.scale * b.scale, torch.float32)
        masked = x * 2
        operators.apply_mask_(masked, a.mask, None)
        return y, masked

    arguments = normal(17, 64), normal(24, 64, seed=1), torch.tensor([0.01])
    compiled = torch.compile(product, fullgraph=True, backend=compiler)
    assert_same(compiled(*arguments), product(*arguments))


def test_a_home_that_cannot_be_written_to_is_no_obstacle(monkeypatch):
    from mqat.kernels.cpu import build

    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    directory = build._cache_directory()
    (directory / "probe").write_text("written")

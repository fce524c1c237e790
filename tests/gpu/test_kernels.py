"""The operators on a GPU: the bits that the reference computes on the CPU, and inside CUDA graphs."""

import pytest
import torch

from mqat.kernels import operators, reference
from mqat.kernels.triton import passes
from mqat.quant.formats import FP8_E4M3, INT4, INT8, INT8_MIN128
from mqat.quant.granularity import PerChannel, PerGroup, PerTensor, PerToken

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_same(name, *arguments):
    """The operator on the GPU and the reference on the CPU; what it returns, or changed."""
    found = []
    for device, function in (
        ("cuda", getattr(torch.ops.mqat, name).default),
        ("cpu", getattr(reference, name)),
    ):
        copies = [x.to(device, copy=True) if isinstance(x, torch.Tensor) else x for x in arguments]
        results = function(*copies)
        results = copies[0] if results is None else results
        results = results if isinstance(results, tuple) else (results,)
        found.append([x.cpu() for x in results])
    for a, b in zip(*found, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
        assert torch.equal(a.view(bits), b.view(bits)), name
    return found[0]


def needs_fp8(fmt):
    if fmt == FP8_E4M3 and not passes.has_fp8_units(torch.device("cuda", 0)):
        pytest.skip("this GPU has no FP8 units")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "granularity", [PerTensor(), PerChannel(), PerGroup(64), PerToken()], ids=str
)
@pytest.mark.parametrize("fmt", [INT8, INT8_MIN128, INT4, FP8_E4M3], ids=lambda f: f.name)
def test_codes_masks_and_values(fmt, granularity, dtype):
    needs_fp8(fmt)
    x = (normal(1000, 512) * 3).to(dtype)
    x[0] = torch.linspace(-1, 1, 512) * 0.01
    x[1, :4] = torch.tensor([float("inf"), -float("inf"), -0.0, 1e-40])
    x[2] = (torch.arange(512) - 256) * 0.5  # ties
    scale = granularity.largest(x.float().clamp(-9, 9).abs()) / fmt.max_value * 0.5
    scale[::2] = 1.0
    names = fmt.name, str(granularity)
    codes, _, mask = assert_same("encode", x, scale, None, *names, None, True)
    assert_same("fake_quantize_with_mask", x, scale, *names, None)
    assert_same("decode", codes, scale, None, names[1], dtype)
    dw = normal(1000, 512, seed=1).to(dtype)
    assert_same("apply_mask_", dw, mask, None)
    assert_same("accumulate_", normal(1000, 512, seed=2), dw, mask, torch.tensor([0.3]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(1, 7, 3), (60, 1024, 520), (333, 1000, 777), (4096, 4096, 2048)]
)
def test_the_integer_gemm(shape, dtype):
    rows, inner, cols = shape
    generator = torch.Generator().manual_seed(0)
    x, w = (
        torch.randint(-128, 128, (n, inner), dtype=torch.int8, generator=generator)
        for n in (rows, cols)
    )
    by_row, by_col = torch.rand(rows, generator=generator), torch.rand(cols, generator=generator)
    for arguments in ((by_col[:1], None), (by_col, None), (by_col, by_row)):
        assert_same("scaled_matmul", x, w, *arguments, dtype)


@pytest.mark.parametrize("per_row", [False, True])
def test_fp8_products(per_row):
    needs_fp8(FP8_E4M3)
    x, w = (normal(n, 1024, seed=n).to(torch.float8_e4m3fn).cuda() for n in (256, 512))
    scale = torch.rand(512 if per_row else 1, device="cuda") + 0.5
    row_scale = torch.rand(256, device="cuda") + 0.5 if per_row else None
    found = operators.scaled_matmul(x, w, scale, torch.bfloat16, row_scale=row_scale)
    factor = scale if row_scale is None else scale * row_scale[:, None]
    expected = (x.double() @ w.double().t()) * factor
    # Tensor cores keep 14 bits of a sum of 32 products before it is added in float32.
    largest = float(expected.abs().max())
    torch.testing.assert_close(found.double(), expected, rtol=2**-7, atol=2**-9 * largest)


def test_a_step_is_recorded_in_a_cuda_graph():
    x, w = normal(128, 256).cuda(), normal(64, 256, seed=1).cuda()
    scale = torch.tensor([0.01], device="cuda")

    def step():
        a = operators.encode(x, scale, INT8, PerTensor(), with_mask=True)
        b = operators.encode(w, scale.expand(64), INT8, PerChannel(), with_mask=False)
        y = operators.scaled_matmul(a.codes, b.codes, a.scale * b.scale, torch.bfloat16)
        masked = torch.ones_like(x)
        operators.apply_mask_(masked, a.mask, None)
        return y, masked

    step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()
    x.copy_(normal(128, 256, seed=2))
    graph.replay()
    for a, b in zip(recorded, step(), strict=True):
        assert torch.equal(a, b)

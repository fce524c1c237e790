"""GEMMs of codes on a GPU against the reference on the CPU, and a step's operators in a CUDA graph."""

import pytest
import torch

from mqat.kernels import operators, reference
from mqat.kernels.triton import passes
from mqat.quant.formats import FP8_E4M3, INT8
from mqat.quant.granularity import PerChannel, PerTensor

pytestmark = pytest.mark.gpu


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


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
        expected = reference.scaled_matmul(x, w, *arguments, dtype)
        on_cuda = (None if tensor is None else tensor.cuda() for tensor in (x, w, *arguments))
        found = torch.ops.mqat.scaled_matmul.default(*on_cuda, dtype)
        assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("per_row", [False, True])
def test_fp8_products(per_row):
    if not passes.has_fp8_units(torch.device("cuda", 0)):
        pytest.skip("this GPU has no FP8 units")
    x, w = (normal(n, 1024, seed=n).to(torch.float8_e4m3fn).cuda() for n in (256, 512))
    scale = torch.rand(512 if per_row else 1, device="cuda") + 0.5
    row_scale = torch.rand(256, device="cuda") + 0.5 if per_row else None
    found = operators.scaled_matmul(x, w, scale, torch.bfloat16, row_scale=row_scale)
    factor = scale if row_scale is None else scale * row_scale[:, None]
    expected = (x.double() @ w.double().t()) * factor
    # Tensor cores keep 14 bits of a sum of 32 products before it is added in float32.
    largest = float(expected.abs().max())
    torch.testing.assert_close(found.double(), expected, rtol=2**-7, atol=2**-9 * largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fmt", [INT8, FP8_E4M3], ids=lambda f: f.name)
def test_codes_out_of_swiglu_are_those_of_its_values_and_values_torchs(fmt, dtype):
    x, grad = (normal(300, 2 * 1032) * 4).to(dtype).cuda(), normal(300, 1032).to(dtype).cuda()
    scale, values = torch.tensor([0.05], device="cuda"), operators.swiglu(x)
    found = operators.swiglu_encode(x, scale, fmt, with_mask=True)
    expected = operators.encode(values, scale, fmt, PerTensor(), with_mask=True)
    assert torch.equal(found.codes.view(torch.uint8), expected.codes.view(torch.uint8))
    assert torch.equal(found.mask, expected.mask) and bool((found.mask != 255).any())
    masked = grad.clone()
    operators.apply_mask_(masked, found.mask, None)
    dx = operators.swiglu_backward(grad, x, found.mask)
    assert torch.equal(dx, operators.swiglu_backward(masked, x, None))
    # Two roundings to the dtype, of values that torch's exponential may move across one.
    limit = 1e-6 if dtype == torch.float32 else 2.0**-7
    for ours, torchs in (
        (values, reference.swiglu(x)),
        (dx, reference.swiglu_backward(masked, x, None)),
    ):
        error = (ours.double() - torchs.double()).norm() / torchs.double().norm()
        assert float(error) < limit


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

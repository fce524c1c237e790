"""GEMMs of one-byte codes, exact for integers, by whatever the device is fast at.

`_int_mm` is used where hardware multiplies int8 (CUDA, CPUs with VNNI). Elsewhere integer codes go
through float32 GEMMs over blocks of `EXACT_BLOCK` inputs, whose sums float32 holds exactly; both
give the same integers. bfloat16 operands are likewise widened where bfloat16 GEMMs are emulated.

Suffixes: N tokens, I input features, O output features.
"""

import torch
from torch import Tensor

# 1024 products of at most 128 * 128 sum to at most 2**24, up to which float32 holds all integers.
EXACT_BLOCK = 1024


# Of this machine's CPU; constants, for which torch.compile has no questions.
_CPU_HAS_INT8 = torch.cpu._is_vnni_supported()
_CPU_HAS_BF16 = (
    torch.backends.mkldnn.is_available()
    and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    and torch.cpu._is_avx512_bf16_supported()
)


def has_int8_units(device: torch.device) -> bool:
    """Whether `torch._int_mm` is faster there than a float32 GEMM."""
    return device.type == "cuda" or (device.type == "cpu" and _CPU_HAS_INT8)


def has_bf16_units(device: torch.device) -> bool:
    """Whether bfloat16 GEMMs are faster there than float32 ones."""
    return device.type == "cuda" or (device.type == "cpu" and _CPU_HAS_BF16)


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which to multiply operands of `dtype`; GEMMs add in float32 in either case."""
    is_emulated = dtype == torch.bfloat16 and not has_bf16_units(device)
    return torch.float32 if is_emulated else dtype


def int8_matmul_native(x_NI: Tensor, w_OI: Tensor) -> Tensor:  # noqa: N803
    """`x @ w.T` of int8 codes as int32 [N, O], by the device's integer GEMM."""
    return torch._int_mm(x_NI, w_OI.t())


def int8_matmul_emulated(x_NI: Tensor, w_OI: Tensor) -> Tensor:  # noqa: N803
    """The same integers by float32 GEMMs; float32 [N, O] if one block suffices, else int32."""
    total: Tensor | None = None
    for x, w in zip(x_NI.split(EXACT_BLOCK, dim=1), w_OI.split(EXACT_BLOCK, dim=1), strict=True):
        partial = x.float() @ w.float().t()
        if x_NI.shape[1] <= EXACT_BLOCK:
            return partial
        total = partial.int() if total is None else total.add_(partial.int())
    assert total is not None, "a linear has at least one input feature"
    return total


def int8_matmul(x_NI: Tensor, w_OI: Tensor) -> Tensor:  # noqa: N803
    """Exact `x @ w.T` of int8 codes, [N, O] in int32 or (integers in) float32.

    cuBLAS takes only more than 16 rows and multiples of 8 features; other shapes are emulated.
    """
    fits = x_NI.device.type != "cuda" or (
        x_NI.shape[0] > 16 and x_NI.shape[1] % 8 == 0 and w_OI.shape[0] % 8 == 0
    )
    if has_int8_units(x_NI.device) and fits:
        return int8_matmul_native(x_NI, w_OI)
    return int8_matmul_emulated(x_NI, w_OI)


def transposed(codes: Tensor) -> Tensor:
    """`codes.t()` as `scaled_matmul` takes it as its second operand, summed along their first dimension.

    Tensor cores read one-byte operands along the summed dimension only; CPUs pack them anyhow.
    """
    return codes.t().contiguous() if codes.device.type == "cuda" else codes.t()


def float_matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """`a @ b`, multiplied in `compute_dtype`, rounded to `dtype`."""
    wide = compute_dtype(dtype, a.device)
    return (a.to(wide) @ b.to(wide)).to(dtype)

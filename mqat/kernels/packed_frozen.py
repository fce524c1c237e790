"""GEMMs with a packed weight that is never trained: gradients pass through to the input.

The backbone under adapters such as QLoRA's (arXiv:2305.14314): weights stay in packed storage and are
decoded on use, once for the product and once more for the input gradient. No float copy is kept.
"""

from typing import Any

import torch
from torch import Tensor

from mqat.errors import UserError
from mqat.kernels.gemm import float_matmul
from mqat.kernels.packed_int8 import Int8Product
from mqat.kernels.packed_weight import Fp8Product, PackedWeight


class _FrozenGemm(torch.autograd.Function):
    """`x @ w.T` of a storage that multiplies and decodes; nothing else is saved."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, storage: Any) -> Tensor:  # noqa: N803
        ctx.storage = storage
        return storage.multiply(x_NI)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (dy_NO,) = grads  # noqa: N806
        return float_matmul(dy_NO, ctx.storage.decode(dy_NO.dtype), dy_NO.dtype), None


def frozen_matmul(x: Tensor, w: PackedWeight) -> Tensor:
    """`x @ w.T`, differentiable in x.

    Args:
        x: Floats [..., I], already fake-quantized where the scheme quantizes inputs.
        w: The stored weight.

    Returns:
        [..., O] in the dtype of x.

    Raises:
        ValueError: The storage only multiplies codes with codes.
    """
    if isinstance(w.storage, Int8Product | Fp8Product):
        raise UserError(
            f"scheme {w.scheme.name!r}: a lowered linear with 8-bit inputs has no gradient. Freeze a "
            "backbone in a weight-only algorithm, such as nf4 or int4."
        )
    rows: Tensor = _FrozenGemm.apply(x.reshape(-1, x.shape[-1]), w.storage)  # type: ignore[no-untyped-call]
    return rows.view(*x.shape[:-1], w.shape[0])

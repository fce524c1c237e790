"""INT8 weights at inference: integer GEMMs with the scale fused, and weight-only products.

On CPUs with VNNI the weight is packed once for oneDNN, which multiplies unsigned inputs (codes + 128,
its zero point) and scales and rounds the sums before they leave the cache. Elsewhere codes go through
`gemm.int8_matmul`. Both scale the same integers in float32 and round once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mqat.kernels.gemm import compute_dtype, has_int8_units
from mqat.kernels.operators import decode, encode, scaled_matmul
from mqat.kernels.stored import CodeProduct, FloatProduct
from mqat.quant.formats import QuantFormat
from mqat.quant.functional import dequantize
from mqat.quant.granularity import PerChannel, PerTensor, PerToken

# Up to this many tokens torch's weight-only kernel is faster than decoding and a bfloat16 GEMM.
KERNEL_ROWS = 8
_ZERO = 128


def _fits_onednn(codes: Tensor) -> bool:
    return codes.device.type == "cpu" and has_int8_units(codes.device)


@torch.library.custom_op("mqat::onednn_linear", mutates_args=())
def onednn_linear(
    x_NI: Tensor,  # noqa: N803
    scale: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    zeros: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """`(x - 128) @ w.T * scale * weight_scale` of uint8 inputs and a weight packed by oneDNN.

    An operator of its own because inductor accepts oneDNN's only with constant weights, and for it a
    number that is read from a tensor ends the graph.
    """
    product: Tensor = torch.ops.onednn.qlinear_pointwise(
        x_NI, float(scale), _ZERO, packed, weight_scale, zeros, None, 1.0, 0, dtype, "none", [], ""
    )
    return product


@onednn_linear.register_fake
def _(
    x: Tensor,
    scale: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    zeros: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty(x.shape[0], weight_scale.shape[0], dtype=dtype)


@dataclass(frozen=True)
class Int8Product(CodeProduct):
    """A weight that is multiplied with INT8 inputs.

    Attributes:
        codes: int8 [O, I]; opaque where oneDNN has packed it.
        scale: float32 (O,).
        zeros: int64 (O,), oneDNN's weight zero points; None where `codes` are plain.
        input_format: Of the inputs' codes.
    """

    codes: Tensor
    scale: Tensor
    zeros: Tensor | None
    input_format: QuantFormat

    @classmethod
    def of(cls, codes: Tensor, scale: Tensor, input_format: QuantFormat) -> Int8Product:
        """From int8 codes [O, I] and steps (O,)."""
        if not _fits_onednn(codes):
            return cls(codes, scale, None, input_format)
        zeros = torch.zeros(codes.shape[0], dtype=torch.int64)
        return cls(torch.ops.onednn.qlinear_prepack(codes, None), scale, zeros, input_format)

    def multiply(self, x_NI: Tensor, scale: Tensor) -> Tensor:  # noqa: N803
        """As `CodeProduct.multiply`, `scale` (1,) or (N,); NaN where x has one (all, or the token)."""
        is_per_token = scale.numel() > 1
        steps = scale[:, None] if is_per_token else scale
        granularity = PerToken() if is_per_token else PerTensor()
        encoded = encode(x_NI, scale, self.input_format, granularity, with_mask=False)
        codes, scale = encoded.codes, encoded.scale
        if self.zeros is None:
            whole = scaled_matmul(codes, self.codes, self.scale, torch.float32)
            return whole.mul_(steps if is_per_token else scale).to(x_NI.dtype)
        unsigned = codes.view(torch.uint8).bitwise_xor_(_ZERO)  # + 128
        if not is_per_token:
            return self._onednn(unsigned, scale, x_NI.dtype)
        one = torch.ones(1, device=x_NI.device)
        return self._onednn(unsigned, one, torch.float32).mul_(steps).to(x_NI.dtype)

    def _onednn(self, x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        assert self.zeros is not None, "the weight is packed"
        return onednn_linear(x, scale, self.codes, self.scale, self.zeros, dtype)


@dataclass(frozen=True)
class Int8Codes(FloatProduct):
    """A weight that is multiplied with float inputs.

    Attributes:
        codes: int8 [O, I].
        scale: float32 (O,).
        ones: bfloat16 (O,), what torch's kernel scales with: the real scale is not on its grid.
    """

    codes: Tensor
    scale: Tensor
    ones: Tensor

    @classmethod
    def of(cls, codes: Tensor, scale: Tensor) -> Int8Codes:
        """From int8 codes [O, I] and steps (O,)."""
        return cls(codes, scale, torch.ones_like(scale, dtype=torch.bfloat16))

    def decode(self, dtype: torch.dtype) -> Tensor:
        """As `FloatProduct.decode`."""
        return dequantize(self.codes, self.scale, PerChannel(), dtype)

    def multiply(self, x_NI: Tensor) -> Tensor:  # noqa: N803
        """`x @ w.T` in the dtype of x: the product with the codes, then the scale."""
        # The kernel reads beyond rows that are not whole vectors (torch 2.13: NaN for 200 inputs).
        is_served = x_NI.shape[0] <= KERNEL_ROWS and x_NI.shape[1] % 32 == 0
        if is_served and x_NI.device.type == "cpu" and x_NI.dtype == torch.bfloat16:
            product = torch._weight_int8pack_mm(x_NI.contiguous(), self.codes, self.ones)
        else:
            wide = compute_dtype(x_NI.dtype, x_NI.device)
            product = x_NI.to(wide) @ decode(self.codes, wide).t()
        return (product * self.scale).to(x_NI.dtype)

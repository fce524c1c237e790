"""Which storage serves which scheme at inference, and the product with it.

| weight           | input                    | stored              | product                         |
|------------------|--------------------------|---------------------|---------------------------------|
| INT8 per row     | INT8 per tensor or token | codes               | integer GEMM, `packed_int8`    |
| INT8 per row     | float                    | codes               | GEMM with codes, scaled per row |
| FP8 per row      | FP8 per tensor           | codes               | `operators.scaled_matmul`       |
| INT4 in groups   | any                      | half a byte each    | torch's kernel, `packed_int4`  |
| NF4, if asked    | float                    | 4.127 bits, `nf4`   | decoded, float GEMM             |
| anything else    | any                      | codes (4 bits: 1/2) | decoded, float GEMM             |

Where a product is in floats, a quantized input is fake-quantized first: the values are those of
training, the storage is the server's.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mqat.errors import UserError
from mqat.kernels.gemm import float_matmul
from mqat.kernels.operators import encode, scaled_matmul
from mqat.kernels.packed_int4 import pack_for_kernel
from mqat.kernels.packed_int8 import Int8Codes, Int8Product
from mqat.kernels.packed_nf4 import BLOCK, nf4_quantize
from mqat.kernels.stored import CodeProduct, FloatProduct, Stored
from mqat.quant.formats import FP8_E4M3, INT8_FORMATS, NF4
from mqat.quant.functional import dequantize, fake_quantize, quantize
from mqat.quant.granularity import Granularity, PerChannel, PerGroup, PerTensor, PerToken
from mqat.quant.packing import pack_nibbles, unpack_nibbles
from mqat.quant.scheme import LinearScheme, TensorScheme

_CHUNK = 256  # rows decoded at a time: intermediate floats stay in the cache
Steps = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Fp8Product(CodeProduct):
    """FP8 codes [O, I] and their steps, (1,) or (O,); inputs are FP8 per tensor."""

    codes: Tensor
    scale: Tensor

    def multiply(self, x_NI: Tensor, scale: Tensor) -> Tensor:  # noqa: N803
        """As `CodeProduct.multiply`, `scale` (1,)."""
        encoded = encode(x_NI, scale, FP8_E4M3, PerTensor(), with_mask=False)
        return scaled_matmul(encoded.codes, self.codes, encoded.scale * self.scale, x_NI.dtype)


@dataclass(frozen=True)
class DecodedCodes(FloatProduct):
    """Codes of any format, decoded for each product.

    Attributes:
        codes: [O, I] in the storage dtype; of 4 bits: two neighbours of a row in a byte of uint8.
        scale: float32.
        zero_point: int32, shaped like `scale`, or None.
        scheme: Of the weight.
        shape: (O, I).
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    scheme: TensorScheme
    shape: tuple[int, int]

    def _unpacked(self, codes: Tensor) -> Tensor:
        fmt = self.scheme.format
        if fmt.bits != 4:
            return codes
        nibbles = unpack_nibbles(codes)[:, : self.shape[1]]
        return (
            nibbles if fmt.storage_dtype == torch.uint8 else nibbles.to(torch.int8) + int(fmt.qmin)
        )

    def decode(self, dtype: torch.dtype) -> Tensor:
        """As `FloatProduct.decode`."""
        fmt, granularity = self.scheme.format, self.scheme.granularity
        is_by_row = isinstance(granularity, PerChannel | PerGroup)
        step = _CHUNK if is_by_row or isinstance(granularity, PerTensor) else self.shape[0]
        weight = self.scale.new_empty(self.shape, dtype=dtype)
        for first in range(0, self.shape[0], step):
            rows = slice(first, first + step)
            own = rows if is_by_row else slice(None)
            zero_point = None if self.zero_point is None else self.zero_point[own]
            weight[rows] = dequantize(
                self._unpacked(self.codes[rows]), self.scale[own], granularity, dtype,
                zero_point=zero_point, fmt=fmt,
            )  # fmt: skip
        return weight


@dataclass(frozen=True)
class PackedWeight(Stored):
    """A weight [O, I] as it is stored for inference.

    Attributes:
        scheme: Of the linear.
        shape: (O, I).
        storage: What multiplies.
    """

    scheme: LinearScheme
    shape: tuple[int, int]
    storage: CodeProduct | FloatProduct


def _is_by_row(granularity: Granularity) -> bool:
    return isinstance(granularity, PerTensor) or type(granularity) is PerChannel


def plain_codes(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: TensorScheme
) -> DecodedCodes:
    """Stores codes [O, I]; of 4 bits, two in a byte."""
    shape, fmt = (codes.shape[0], codes.shape[1]), scheme.format
    if fmt.bits == 4:
        nibbles = codes if codes.dtype == torch.uint8 else (codes - int(fmt.qmin)).to(torch.uint8)
        codes = pack_nibbles(torch.nn.functional.pad(nibbles, (0, shape[1] % 2)))
    return DecodedCodes(codes, scale.clone(), zero_point, scheme, shape)


@torch.no_grad()
def pack_weight(
    weight: Tensor,
    scale: Tensor,
    scheme: LinearScheme,
    zero_point: Tensor | None = None,
    *,
    double_quantization: bool = False,
) -> PackedWeight:
    """Quantizes a weight [O, I] with its frozen steps; every scheme is served.

    `double_quantization` keeps the block maxima of NF4 in 8 bits, which moves them (`packed_nf4.py`).
    """
    assert scheme.weight is not None, "only quantized weights are lowered"
    operand, operand_of_x = scheme.weight, scheme.input
    fmt, granularity = operand.format, operand.granularity
    is_nf4 = fmt == NF4 and granularity == PerGroup(BLOCK) and weight.shape[1] % BLOCK == 0
    if double_quantization and is_nf4:
        rows, width = weight.shape
        return PackedWeight(scheme, (rows, width), nf4_quantize(weight))
    codes = quantize(weight, scale, fmt, granularity, zero_point=zero_point)
    shape = (codes.shape[0], codes.shape[1])
    is_symmetric = zero_point is None and not (operand_of_x and operand_of_x.is_asymmetric)
    storage: CodeProduct | FloatProduct | None = None
    if fmt in INT8_FORMATS and _is_by_row(granularity) and is_symmetric:
        per_row = scale.expand(shape[0]).contiguous()
        if operand_of_x is None:
            storage = Int8Codes.of(codes, per_row)
        elif operand_of_x.format in INT8_FORMATS and isinstance(
            operand_of_x.granularity, PerTensor | PerToken
        ):
            storage = Int8Product.of(codes, per_row, operand_of_x.format)
    elif fmt == FP8_E4M3 and _is_by_row(granularity) and operand_of_x is not None:
        if operand_of_x.format == FP8_E4M3 and operand_of_x.granularity == PerTensor():
            storage = Fp8Product(codes, scale.clone())
    elif isinstance(granularity, PerGroup):
        storage = pack_for_kernel(codes, scale, zero_point, fmt, granularity.size)
    if storage is None:
        storage = plain_codes(codes, scale, zero_point, operand)
    return PackedWeight(scheme, shape, storage)


@torch.no_grad()
def packed_matmul(x: Tensor, steps: Steps | None, w: PackedWeight) -> Tensor:
    """`x @ w.T` of floats [..., I] for inference, [..., O] in the dtype of x.

    `steps`: scale and zero point of x, static or computed from it; None: it is not quantized.
    """
    storage, operand = w.storage, w.scheme.input
    scale, zero_point = steps or (None, None)
    if isinstance(storage, CodeProduct):
        assert scale is not None, "the input has a scale"
        product = storage.multiply(x.reshape(-1, x.shape[-1]), scale.reshape(-1))
    else:
        if scale is not None and operand is not None:
            x = fake_quantize(x, scale, operand.format, operand.granularity, zero_point=zero_point)
        product = storage.multiply(x.reshape(-1, x.shape[-1]))
    return product.view(*x.shape[:-1], w.shape[0])


class _FrozenGemm(torch.autograd.Function):
    """`x @ w.T` of a storage that multiplies and decodes; nothing else is saved."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, storage: FloatProduct) -> Tensor:  # noqa: N803
        ctx.storage = storage
        return storage.multiply(x_NI)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (dy_NO,) = grads  # noqa: N806
        return float_matmul(dy_NO, ctx.storage.decode(dy_NO.dtype), dy_NO.dtype), None


def frozen_matmul(x: Tensor, w: PackedWeight) -> Tensor:
    """`x @ w.T` [..., O] of a weight that is never trained: gradients pass through to the input.

    The backbone under adapters such as QLoRA's (arXiv:2305.14314): weights stay in packed storage and
    are decoded on use, once for the product and once more for the input gradient. No float copy is kept.
    `x` [..., I] is fake-quantized already where the scheme quantizes inputs.

    Raises:
        UserError: The storage only multiplies codes with codes.
    """
    if isinstance(w.storage, CodeProduct):
        raise UserError(
            f"scheme {w.scheme.name!r}: a lowered linear with 8-bit inputs has no gradient. Freeze a "
            "backbone in a weight-only algorithm, such as nf4 or int4."
        )
    rows: Tensor = _FrozenGemm.apply(x.reshape(-1, x.shape[-1]), w.storage)  # type: ignore[no-untyped-call]
    return rows.view(*x.shape[:-1], w.shape[0])

"""Inference GEMMs on stored codes: INT8 and FP8 one byte, INT4 half a byte per weight.

| scheme              | stored              | product                                               |
|---------------------|---------------------|-------------------------------------------------------|
| INT8 x INT8, FP8    | codes               | `gemm.scaled_matmul`: what training computes          |
| INT8 weight only    | codes               | float GEMM with the codes, scaled per output          |
| INT4 groups         | two codes in a byte | unpacked for the GEMM; for up to `DECODE_ROWS` tokens |
|                     | + packed for torch  | in bfloat16 on a CPU: `_weight_int4pack_mm_for_cpu`   |
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mqat.quant.formats import INT4
from mqat.quant.functional import dequantize, quantize
from mqat.quant.gemm import compute_dtype, decode, float_matmul, scaled_matmul
from mqat.quant.gemm_operands import encode_input
from mqat.quant.granularity import PerChannel, PerGroup, PerTensor
from mqat.quant.packing import pack_int4, unpack_int4
from mqat.quant.scheme import LinearScheme

# Above this many tokens unpacking once and a float GEMM are faster than torch's kernel (measured).
DECODE_ROWS = 16
_TORCH_GROUP_SIZES = (32, 64, 128, 256)


@dataclass(frozen=True)
class LoweredWeight:
    """A weight [O, I] as it is stored for inference.

    Attributes:
        scheme: Of the linear.
        shape: (O, I).
        codes: int8 or float8 [O, I]; INT4: int8 [O/2, I] of `pack_int4`.
        scale: float32, as calibrated.
        torch_pack: INT4 codes and bfloat16 scales as torch's kernel takes them, if it can.
    """

    scheme: LinearScheme
    shape: tuple[int, int]
    codes: Tensor
    scale: Tensor
    torch_pack: tuple[Tensor, Tensor] | None

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        held = [self.codes, self.scale, *(self.torch_pack or ())]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)


def _pack_for_torch(codes: Tensor, scale: Tensor, group_size: int) -> tuple[Tensor, Tensor] | None:
    """Operands of `_weight_int4pack_mm_for_cpu`: unsigned codes around 8, (scale, zero) [G, O, 2]."""
    is_served = (
        codes.device.type == "cpu"
        and group_size in _TORCH_GROUP_SIZES
        and codes.shape[1] % group_size == 0
        and codes.shape[0] % 16 == 0
    )
    if not is_served:
        return None
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int() + 8, 1)
    pairs = torch.stack([scale, torch.zeros_like(scale)], dim=-1).transpose(0, 1)
    return packed, pairs.to(torch.bfloat16).contiguous()


@torch.no_grad()
def lower_weight(weight: Tensor, scale: Tensor, scheme: LinearScheme) -> LoweredWeight:
    """Quantizes a weight for inference with its frozen scale.

    Raises:
        ValueError: A scheme without an inference GEMM here.
    """
    assert scheme.weight is not None, "only quantized weights are lowered"
    fmt, granularity = scheme.weight.format, scheme.weight.granularity
    is_codes = fmt.bits == 8 and isinstance(granularity, (PerChannel, PerTensor))
    is_packed = fmt == INT4 and isinstance(granularity, PerGroup) and weight.shape[0] % 2 == 0
    is_static = scheme.input is None or (
        scheme.input.granularity == PerTensor() and not scheme.input.is_asymmetric
    )
    same_kind = scheme.input is None or scheme.input.format.is_float == fmt.is_float
    if not (is_static and (is_packed or (is_codes and same_kind))):
        raise ValueError(
            f"scheme {scheme.name!r} has no low-precision inference here; known are int8, int8_wo, "
            "int4, int4_w_int8_a and fp8. Evaluate it without --lowered."
        )
    shape = (weight.shape[0], weight.shape[1])
    codes = quantize(weight, scale, fmt, granularity)
    if not is_packed:
        return LoweredWeight(scheme, shape, codes, scale.clone(), None)
    assert isinstance(granularity, PerGroup)
    # The kernel has bfloat16 scales only; other grids must not be rounded silently.
    is_bf16_grid = scheme.weight.scale_dtype == torch.bfloat16
    torch_pack = _pack_for_torch(codes, scale, granularity.size) if is_bf16_grid else None
    return LoweredWeight(scheme, shape, pack_int4(codes), scale.clone(), torch_pack)


def _int4_matmul(x_NI: Tensor, w: LoweredWeight) -> Tensor:  # noqa: N803
    assert w.scheme.weight is not None and isinstance(w.scheme.weight.granularity, PerGroup)
    granularity = w.scheme.weight.granularity
    if w.torch_pack is not None and x_NI.shape[0] <= DECODE_ROWS and x_NI.dtype == torch.bfloat16:
        packed, pairs = w.torch_pack
        product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x_NI.contiguous(), packed, granularity.size, pairs
        )
        return product
    values = dequantize(unpack_int4(w.codes), w.scale, granularity, x_NI.dtype)
    return float_matmul(x_NI, values.t(), x_NI.dtype)


@torch.no_grad()
def lowered_matmul(x: Tensor, input_scale: Tensor | None, w: LoweredWeight) -> Tensor:
    """`x @ w.T` for inference: x [..., I] in floats, result [..., O] in its dtype."""
    rows = x.reshape(-1, x.shape[-1])
    operand = w.scheme.input
    if w.scheme.weight is not None and w.scheme.weight.format == INT4:
        if operand is not None:
            assert input_scale is not None, "a quantized input has a scale"
            encoded = encode_input(rows, input_scale, operand.format, with_mask=False)
            rows = dequantize(encoded.codes, encoded.scale, PerTensor(), x.dtype)
        y = _int4_matmul(rows, w)
    elif operand is not None:
        assert input_scale is not None, "a quantized input has a scale"
        encoded = encode_input(rows, input_scale, operand.format, with_mask=False)
        y = scaled_matmul(encoded.codes, w.codes, encoded.scale * w.scale, x.dtype)
    else:
        wide = compute_dtype(x.dtype, x.device)
        y = ((rows.to(wide) @ decode(w.codes, wide).t()) * w.scale).to(x.dtype)
    return y.view(*x.shape[:-1], w.shape[0])

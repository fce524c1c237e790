"""Number formats: the codes a quantized value can take, and how codes are stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class QuantFormat:
    """A code range and the divisor that maps a calibrated maximum to one step.

    Attributes:
        name: Identifier in checkpoints.
        bits: Bits per stored code.
        qmin: Smallest code (for floating-point formats, the most negative value).
        qmax: Largest code.
        max_value: `scale = amax / max_value`.
        storage_dtype: dtype of unpacked codes.
        is_float: Whether codes are floating-point values rather than integers.
    """

    name: str
    bits: int
    qmin: float
    qmax: float
    max_value: float
    storage_dtype: torch.dtype
    is_float: bool = False


# Weights: symmetric, so that -w has the code -q.
INT8 = QuantFormat("int8", 8, -127, 127, 127, torch.int8)
# Activations: TensorRT's quantize layer saturates at -128, and training must do the same.
INT8_FULL = QuantFormat("int8_full", 8, -128, 127, 127, torch.int8)
# The grid on which TensorRT-LLM's loader puts weight-only INT8 (symmetric_quantize_last_axis).
INT8_LOADER = QuantFormat("int8_loader", 8, -128, 127, 128, torch.int8)
INT4 = QuantFormat("int4", 4, -8, 7, 7, torch.int8)
FP8_E4M3 = QuantFormat("fp8_e4m3", 8, -448, 448, 448, torch.float8_e4m3fn, is_float=True)

FORMATS = {f.name: f for f in (INT8, INT8_FULL, INT8_LOADER, INT4, FP8_E4M3)}

"""Number formats: the codes a quantized value can take, and how codes are stored."""

import math
from dataclasses import dataclass
from itertools import pairwise

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
        is_float: Whether values are floating-point numbers rather than integers.
        levels: Value of every code, where `storage_dtype` cannot say it (uint8 codes of 4 bits).
    """

    name: str
    bits: int
    qmin: float
    qmax: float
    max_value: float
    storage_dtype: torch.dtype
    is_float: bool = False
    levels: tuple[float, ...] = ()

    @property
    def is_unsigned(self) -> bool:
        """Codes start at 0, so that negative values need a zero point."""
        return self.qmin == 0

    @property
    def is_uniform(self) -> bool:
        """Neighbouring values are one step apart, as the gradients of learned scales assume."""
        steps = [b - a for a, b in pairwise(self.levels)]
        return all(step == 1 for step in steps) and (bool(steps) or not self.is_float)

    @property
    def smallest_step(self) -> float:
        """Between two neighbouring values, where they are closest."""
        if self.levels:
            return min(b - a for a, b in pairwise(sorted(set(self.levels))))
        info = torch.finfo(self.storage_dtype) if self.is_float else None
        return info.tiny * info.eps if info else 1.0

    @property
    def max_exponent(self) -> int:
        """floor(log2(max_value)): what MX shared exponents are lowered by."""
        return math.frexp(self.max_value)[1] - 1


def _signed(bits: int) -> QuantFormat:
    top = 2 ** (bits - 1) - 1
    return QuantFormat(f"int{bits}", bits, -top - 1, top, top, torch.int8)


def _unsigned(bits: int) -> QuantFormat:
    top = 2**bits - 1
    return QuantFormat(f"uint{bits}", bits, 0, top, top, torch.uint8)


# Weights: symmetric, so that -w has the code -q.
INT8 = QuantFormat("int8", 8, -127, 127, 127, torch.int8)
# Activations: TensorRT's quantize layer saturates at -128, and training must do the same.
INT8_MIN128 = QuantFormat("int8_full", 8, -128, 127, 127, torch.int8)
# The grid on which TensorRT-LLM's loader puts weight-only INT8 (symmetric_quantize_last_axis).
INT8_AMAX128 = QuantFormat("int8_loader", 8, -128, 127, 128, torch.int8)
INT8_FORMATS = (INT8, INT8_MIN128, INT8_AMAX128)
INT4 = _signed(4)
# torchao's and Quark's symmetric INT4: 15 steps span -amax..amax, so +amax rounds half a step down.
INT4_AMAX7_5 = QuantFormat("int4_even", 4, -8, 7, 7.5, torch.int8)
UINT4 = _unsigned(4)
# Stretched grids of ParetoQ (arXiv:2502.02631, "SEQ"): k levels share -amax..amax evenly, so that a
# step is 2 amax / k and the outermost levels lie half a step inside.
# k = 3: -2/3, 0 and 2/3 of amax.
TERNARY = QuantFormat("ternary", 2, -1, 1, 1.5, torch.int8)
# k = 4: odd quarters of amax; no zero. Code = index of the level.
INT2_ELASTIC = QuantFormat(
    "int2_elastic", 2, -1.5, 1.5, 2, torch.uint8, is_float=True, levels=(-1.5, -0.5, 0.5, 1.5)
)

FP8_E4M3 = QuantFormat("fp8_e4m3", 8, -448, 448, 448, torch.float8_e4m3fn, is_float=True)
FP8_E5M2 = QuantFormat("fp8_e5m2", 8, -57344, 57344, 57344, torch.float8_e5m2, is_float=True)

# Code = sign bit, two exponent bits, one mantissa bit (OCP Microscaling Formats 1.0, section 5.3.3).
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4_E2M1 = QuantFormat(
    "fp4_e2m1", 4, -6, 6, 6, torch.uint8, is_float=True, levels=(*_E2M1, *(-v for v in _E2M1))
)
# Quantiles of a normal distribution, an exact zero among them (QLoRA, arXiv:2305.14314, appendix E).
NF4 = QuantFormat(
    "nf4", 4, -1, 1, 1, torch.uint8, is_float=True,
    levels=(
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
)  # fmt: skip

FORMATS = {
    f.name: f
    for f in (
        *(_signed(bits) for bits in (2, 3, 5, 6, 7)),
        *(_unsigned(bits) for bits in range(2, 9)),
        *(INT8, INT8_MIN128, INT8_AMAX128, INT4, INT4_AMAX7_5, TERNARY, INT2_ELASTIC),
        *(FP8_E4M3, FP8_E5M2, FP4_E2M1, NF4),
    )
}

"""Patterns of operands, by which forms are found: number format, granularity, scales, zero points."""

from dataclasses import dataclass, replace

import torch

from mqat.quant.formats import (
    FP4_E2M1,
    FP8_E4M3,
    INT4,
    INT4_AMAX7_5,
    INT8_FORMATS,
    INT8_MIN128,
    UINT4,
    QuantFormat,
)
from mqat.quant.granularity import Granularity, PerChannel, PerGroup, PerTensor, PerToken
from mqat.quant.scheme import LinearScheme, TensorScheme

F32, BF16, E4M3 = torch.float32, torch.bfloat16, torch.float8_e4m3fn


@dataclass(frozen=True)
class OperandPattern:
    """The operands that a form takes.

    Attributes:
        formats: Any of these.
        granularity: This one, or any size of a kind.
        scale_dtypes: Any of these grids of scales; servers that keep scales in the model's dtype need
            those on bfloat16's.
        is_dynamic: As of `TensorScheme`.
        is_asymmetric: As of `TensorScheme`.
    """

    formats: tuple[QuantFormat, ...]
    granularity: Granularity | type[Granularity]
    scale_dtypes: tuple[torch.dtype, ...] = (F32, BF16)
    is_dynamic: bool = False
    is_asymmetric: bool = False

    def unmet(self, kind: str, operand: TensorScheme | None) -> list[str]:
        """Requirements of the pattern that an operand does not meet, in words; empty: it matches."""
        if operand is None:
            return [f"a quantized {kind}"]
        wanted = self.granularity
        size = wanted.__name__ if isinstance(wanted, type) else str(wanted)
        grids = (str(dtype).removeprefix("torch.") for dtype in self.scale_dtypes)
        found = {
            f"format {' or '.join(f.name for f in self.formats)}": operand.format in self.formats,
            f"granularity {size}": wanted in (operand.granularity, type(operand.granularity)),
            f"scale {' or '.join(grids)}": operand.scale_dtype in self.scale_dtypes,
            f"dynamic: {self.is_dynamic}": operand.is_dynamic == self.is_dynamic,
            f"asymmetric: {self.is_asymmetric}": operand.is_asymmetric == self.is_asymmetric,
        }
        return [f"{kind} {text}" for text, is_met in found.items() if not is_met]


INT8_CHANNELS = OperandPattern(INT8_FORMATS, PerChannel)
INT8_TENSOR = OperandPattern((INT8_MIN128,), PerTensor)  # kernels saturate inputs at -128
INT8_TOKENS = OperandPattern((INT8_MIN128,), PerToken, (F32,), is_dynamic=True)
INT8_SHIFTED_TOKENS = replace(INT8_TOKENS, is_asymmetric=True)
INT4_GROUPS = OperandPattern((INT4, INT4_AMAX7_5), PerGroup, (BF16,))
INT4_F32_GROUPS = replace(INT4_GROUPS, scale_dtypes=(F32,))
UINT4_GROUPS = OperandPattern((UINT4,), PerGroup, (BF16,), is_asymmetric=True)
FP8_TENSOR = OperandPattern((FP8_E4M3,), PerTensor)
FP8_CHANNELS = OperandPattern((FP8_E4M3,), PerChannel)
FP8_TOKENS = OperandPattern((FP8_E4M3,), PerToken, (F32,), is_dynamic=True)
NVFP4 = OperandPattern((FP4_E2M1,), PerGroup(16), (E4M3,))
NVFP4_INPUT = replace(NVFP4, is_dynamic=True)


def is_integer(operand: TensorScheme | None) -> bool:
    """Whether an operand is quantized to integers."""
    return operand is not None and not operand.format.is_float


def operands_text(scheme: LinearScheme) -> str:
    """A linear's operands in words, such as `int8 (weight int8 per channel, input unquantized)`."""
    texts = {"weight": "unquantized", "input": "unquantized"}
    for kind, operand in scheme.operands.items():
        flags = [f for f in ("dynamic", "asymmetric") if getattr(operand, f"is_{f}")]
        texts[kind] = " ".join([operand.format.name, "per", str(operand.granularity), *flags])
    return f"{scheme.name} ({', '.join(f'{kind} {text}' for kind, text in texts.items())})"


def group_size(scheme: LinearScheme) -> int | None:
    """Elements of a row that share a weight scale, where a weight has groups."""
    granularity = scheme.weight.granularity if scheme.weight else None
    return granularity.size if isinstance(granularity, PerGroup) else None

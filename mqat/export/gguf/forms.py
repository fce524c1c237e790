"""Which linears llama.cpp's blocks of 32 hold, and the bytes of these blocks.

| type | a block is                                                     | stands for         |
|------|----------------------------------------------------------------|--------------------|
| Q8_0 | step (float16), 32 codes (int8)                                | step x code        |
| Q4_0 | step (float16), 16 bytes of codes 0..15                        | step x (code - 8)  |
| Q4_1 | step, offset (float16 each), 16 bytes of codes 0..15           | step x code + offset |

Byte `j` of four-bit codes has that of element `j` in its low and that of `j + 16` in its high half.
Source: llama.cpp `ggml/src/ggml-common.h` and `ggml-quants.c` (`dequantize_row_*`).
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mqat.errors import UserError
from mqat.export.forms import Form, Forms
from mqat.export.gguf.container import ELEMENTS, Q4_0, Q4_1, Q8_0, Block, BlockPlan
from mqat.export.kv_cache import CacheForm
from mqat.export.operands import BF16, OperandPattern
from mqat.export.reshard import row_chunks
from mqat.export.served_linear import ServedLinear
from mqat.quant.formats import INT4, INT4_AMAX7_5, INT8, UINT4
from mqat.quant.granularity import PerGroup

_HALF = ELEMENTS // 2


def _blocks(
    block: Block, numbers: Callable[[Tensor, Tensor | None], list[Tensor]], shift: int
) -> Callable[[ServedLinear], BlockPlan]:
    """A builder of rows of blocks.

    Args:
        block: Their type.
        numbers: (steps, zero points) of groups -> what stands before the codes, float32 [rows, groups].
        shift: Added to codes of four bits, so that they begin with 0.
    """

    def build(served: ServedLinear) -> BlockPlan:
        out, width = served.shape

        def chunks() -> Iterator[Tensor]:
            all_rows = row_chunks(served.rows, width)
            for rows, codes in zip(all_rows, served.codes(), strict=True):
                scale = served.scale(rows)
                _check_steps(served, scale)
                blocks = codes.view(len(codes), -1, ELEMENTS)
                before = [
                    n.to(torch.float16)[..., None].view(torch.uint8)
                    for n in numbers(scale, served.zero_point(rows))
                ]
                packed = blocks.view(torch.uint8) if block is Q8_0 else _nibbles(blocks, shift)
                yield torch.cat([*before, packed], dim=-1).flatten(1)

        shape = (out, width // ELEMENTS * block.num_bytes)
        return BlockPlan(torch.uint8, shape, chunks, block=block)

    return build


def _nibbles(codes: Tensor, shift: int) -> Tensor:
    """uint8 [..., 16] of codes [..., 32]."""
    unsigned = (codes.to(torch.int16) + shift).to(torch.uint8)
    return unsigned[..., :_HALF] | unsigned[..., _HALF:] << 4


def _check_steps(served: ServedLinear, scale: Tensor) -> None:
    """Refuses steps that float16 would round."""
    if not torch.equal(scale.to(torch.float16).float(), scale):
        raise UserError(
            f"{served.name}: steps between {scale.min():.3g} and {scale.max():.3g} do not fit "
            "llama.cpp's float16 exactly; use another export.format."
        )


def _offset(scale: Tensor, zero: Tensor | None) -> list[Tensor]:
    assert zero is not None, "the pattern asks for zero points"
    return [scale, -zero * scale]


FORMS = Forms(
    "llama.cpp",
    (
        Form(
            "Q8_0", OperandPattern((INT8,), PerGroup(ELEMENTS), (BF16,)), None,
            {"weight": _blocks(Q8_0, lambda scale, _: [scale], 0)},
        ),
        Form(
            "Q4_0", OperandPattern((INT4, INT4_AMAX7_5), PerGroup(ELEMENTS), (BF16,)), None,
            {"weight": _blocks(Q4_0, lambda scale, _: [scale], 8)},
        ),
        Form(
            "Q4_1", OperandPattern((UINT4,), PerGroup(ELEMENTS), (BF16,), is_asymmetric=True), None,
            {"weight": _blocks(Q4_1, _offset, 0)},
        ),
    ),
    (
        (
            lambda weight, x: x is not None,
            "Its files hold weights; leave inputs unquantized (quantization.disabled: ['*.input']).",
        ),
        (
            lambda weight, x: True,
            "Its blocks have 32 elements: int4, int4_awq, w_int4_sym or w_uint4_asym with "
            "quantization.group_size=32, or a rule of int8 weights in groups of 32 with bfloat16 steps.",
        ),
    ),
)  # fmt: skip
CACHE = CacheForm(lambda cache: {}, (), (), is_beside_linears=True)

"""What the values of one exported tensor must satisfy, looking at all tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mqat.verify.expected import EMBEDDING, LM_HEAD, Expected, module_of
from mqat.verify.layout import INT4_ALGORITHMS, MODULES, ServedConfig
from mqat.verify.operands import fp4_unpacked, fp4_values

# File name -> its tensor, in the order of the ranks of one stage.
Ranks = dict[str, Tensor]

# A calibrated weight reaches its largest code somewhere; one that stays below half of it has a scale
# that is too large by a factor (FP8 codes: 448 / 64 leaves room for weights that shrank in training).
_LEAST_REACH = {
    "W8A8_SQ_PER_CHANNEL": 64.0, "FP8": 64.0, "FP8_PER_CHANNEL_PER_TOKEN": 64.0, "W4A16_AWQ": 4.0,
    "W4A8_AWQ": 4.0, "NVFP4": 3.0,
}  # fmt: skip


def value_problems(
    name: str, ranks: Ranks, expected: Expected, config: ServedConfig
) -> Iterator[str]:
    """Problems of one tensor of a stage, each naming file and tensor."""
    sound = True
    for file, tensor in ranks.items():
        problem = _number_problem(name, tensor, config)
        if problem is not None:
            sound = False
            yield f"{file}: {name} {problem}"
    files = list(ranks)
    if expected.is_replicated:
        for file in files[1:]:
            if not same_bytes(ranks[files[0]], ranks[file]):
                yield f"{file}: {name} differs from {files[0]}, must be the same"
    if not sound:
        return
    yield from _padding_problems(name, ranks, config)
    yield from _copy_problems(name, ranks, config)
    module = name.removesuffix(".weight")
    if module_of(name) in MODULES and module != name and config.is_quantized(module):
        yield from _reach_problems(name, ranks, config)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Equality of bits, so that FP8 codes and signed zeros count."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def int4_codes(packed: Tensor) -> Tensor:
    """Codes int8 [O, I] from bytes [O/2, I]: even row in the low nibble, two's complement."""
    unsigned = packed.contiguous().view(torch.uint8)
    rows = torch.stack([unsigned % 16, unsigned // 16], dim=1).flatten(0, 1).to(torch.int8)
    return torch.where(rows >= 8, rows - 16, rows)


def _values(weight: Tensor, algorithm: str) -> Tensor:
    """Multiples of the step, float32."""
    if algorithm in INT4_ALGORITHMS:
        return int4_codes(weight).float()
    return fp4_values(fp4_unpacked(weight)) if algorithm == "NVFP4" else weight.float()


def _number_problem(name: str, tensor: Tensor, config: ServedConfig) -> str | None:
    values = tensor.float()
    if not values.isfinite().all():
        return "holds NaN or infinity"
    is_scale = name.endswith(("scaling_factor", "scaling_factor_2", "per_channel_scale"))
    if is_scale and not (values > 0).all():
        return "holds a scale that is not positive"
    if name.endswith("prequant_scaling_factor") and not (values == 1).all():
        return "is not all ones, but mqat folds smoothing into the weights"
    is_int8 = config.algorithm_of(name.rpartition(".")[0]) == "W8A8_SQ_PER_CHANNEL"
    if tensor.dtype == torch.int8 and is_int8 and (tensor == -128).any():
        return "holds the code -128, outside -127..127"
    return None


def _padding_problems(name: str, ranks: Ranks, config: ServedConfig) -> Iterator[str]:
    if name not in (EMBEDDING, LM_HEAD):
        return
    for tp_rank, (file, tensor) in enumerate(ranks.items()):
        real = max(int(config.raw["vocab_size"]) - tp_rank * config.vocab_per_rank, 0)
        if tensor[real:].any():
            yield f"{file}: {name} has padding rows that are not zero"


def _copy_problems(name: str, ranks: Ranks, config: ServedConfig) -> Iterator[str]:
    """With more ranks than key/value heads, the copies of a head must be the same."""
    copies = config.key_value_copies
    tensors = list(ranks.items())
    if copies < 2 or module_of(name) != "attention.qkv":
        return
    if name.endswith((".activation_scaling_factor", ".prequant_scaling_factor", "_factor_2")):
        return
    rows = 2 * int(config.raw["head_size"]) * config.key_value_heads_per_rank
    full = rows + config.heads_per_rank * int(config.raw["head_size"])
    if tensors[0][1].shape[0] not in (full, full // 2):
        return  # one scale for the whole tensor
    tail = rows * tensors[0][1].shape[0] // full  # packed codes hold two rows a byte
    for rank, (file, tensor) in enumerate(tensors):
        original = tensors[rank - rank % copies]
        if not same_bytes(tensor[-tail:], original[1][-tail:]):
            yield f"{file}: {name} holds a copy of a key/value head that differs from {original[0]}"


def _reach_problems(name: str, ranks: Ranks, config: ServedConfig) -> Iterator[str]:
    algorithm = config.algorithm_of(name.removesuffix(".weight")) or ""
    least = _LEAST_REACH.get(algorithm)
    if least is None:
        return
    reach = max(float(_values(tensor, algorithm).abs().max()) for tensor in ranks.values())
    if 0 < reach < least:  # an all-zero weight has no codes to reach
        yield f"{name} uses codes up to {reach:g} only on all ranks; its scale is too large"

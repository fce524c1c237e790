"""Turns 8-bit gradients of quantized linears on; what the noise of their rounding depends on.

Rounding is unbiased and a pure function: of the seed, the linear, the optimizer step, the rank among
those of data and context parallelism, the microbatch's number on that rank, the token's number there and
the output's number in the whole linear. So it does not depend on the pipeline's cut, its schedule or
recomputation, nor on which part of a linear a rank holds. What still depends on tensor parallelism is
the step of a token's gradient in a column-parallel linear: it is that of the rank's own outputs (at most
that of all, so no noisier), because their maximum over ranks would be one more collective ahead of every
input-gradient GEMM. Sums in another order move a value across a threshold now and then. Data- and
context-parallel ranks have noise of their own, so that it averages out over them; it is therefore
another one at another data- or context-parallel size.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from mqat.errors import UserError
from mqat.parallel.backward_formats import FORMATS, check_backward
from mqat.parallel.linear import QuantizedLinear, QuantRowParallelLinear, quantized_linears
from mqat.parallel.linear_gradients import GradientNoise


def _output_numbers(linear: QuantizedLinear) -> Tensor:
    """Numbers of this rank's outputs in the whole linear, int32 (O,); fused parts are cut separately."""
    rows, tp, rank = linear.weight.shape[0], linear.tp_group.size(), linear.tp_group.rank()
    own = torch.arange(rows, dtype=torch.int32, device=linear.weight.device)
    if isinstance(linear, QuantRowParallelLinear):
        return own
    size = rows // linear.parts
    return own // size * (size * tp) + rank * size + own % size


def _data_rank() -> int:
    """This rank's number among those of data and context parallelism together."""
    if not parallel_state.is_initialized():
        return 0
    return int(parallel_state.get_data_parallel_rank(with_context_parallel=True))


def set_backward_(model: Any, backward: str, *, seed: int = 0) -> None:
    """Chooses how gradients of the quantized linears are multiplied: exactly, or in 8 bits.

    While a linear's quantizers are off or not frozen, its gradients are exact in either case.

    Args:
        model: Chunk or list of chunks of this rank.
        backward: `bf16`, the exact straight-through gradient in the model's dtype; `int8` or `fp8`.
        seed: Of the rounding; the same on all ranks (each adds its data- and context-parallel number).

    Raises:
        UserError: A linear's scheme does not go with it (`check_backward`), or its scales are trained.
    """
    linears, rank = quantized_linears(model), _data_rank()
    quantized = {name: x for name, x in linears.items() if x.scheme is not None and x.quantizers}
    check_backward(backward, {n: x.scheme for n, x in quantized.items() if x.scheme is not None})
    for name, linear in quantized.items():
        if backward == "bf16":
            linear.gradient_noise = None
            continue
        learned = [kind for kind, q in linear.quantizers.items() if q.rule is not None]
        if learned:
            raise UserError(
                f"backward={backward}: {name} trains its {learned[0]} scale, whose gradient needs "
                "the exact one of every element. Set backward to bf16, or freeze the scales."
            )
        linear.gradient_noise = GradientNoise(
            FORMATS[backward], _output_numbers(linear), f"{seed} {rank} {name}"
        )

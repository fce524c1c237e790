"""Moves outliers out of the down projection's input without changing the function.

The input of `linear_fc2` is `silu(gate) * up`, so dividing row `j` of up by `s_j` and multiplying
column `j` of the down projection by `s_j` leaves the model's output as it was, while its activations
become easier to quantize per tensor:

    s_j = amax(x_j)**alpha / amax(W_j)**(1 - alpha)

This is SmoothQuant's migration (Xiao et al. 2023, arXiv:2211.10438, eq. 4), folded into the previous
weight so that it costs nothing when served. Scales are powers of two, so folding is exact in
floating point. Row `j` of up and column `j` of down live on the same rank at every TP size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mqat.calibration.statistics import exact_forward
from mqat.parallel.linear import QuantizedLinear, quantized_linears
from mqat.parallel.reduce import all_reduce_fused_


def migration_scale(input_amax: Tensor, weight_amax: Tensor, alpha: float) -> Tensor:
    """Per-channel factor, rounded to a power of two.

    Args:
        input_amax: Largest |x_j| of each input channel, float32 [I].
        weight_amax: Largest |W_oj| of each weight column, float32 [I].
        alpha: 0 leaves activations alone, 1 moves all of their range into the weights.
    """
    floor = 1e-5  # dead channels: keep their factor moderate
    raw = input_amax.clamp_min(floor) ** alpha / weight_amax.clamp_min(floor) ** (1 - alpha)
    return torch.exp2(torch.log2(raw).round())


def equalize_mlp_(
    model: Any, run_batches: Callable[[], None], *, dp_group: dist.ProcessGroup, alpha: float
) -> None:
    """Rescales `linear_fc1` (up rows) and `linear_fc2` (columns) of every layer of this rank.

    Args:
        model: Chunk or list of chunks with quantized linears; weights are changed in place.
        run_batches: Runs the calibration forward passes.
        dp_group: Data-parallel group; channels are already split the same way as the weights over
            TP, so nothing else needs to be reduced.
        alpha: Migration strength in [0, 1].
    """
    linears = quantized_linears(model)
    downs = {n: x for n, x in linears.items() if n.endswith("mlp.linear_fc2")}
    amax = {
        n: torch.zeros(x.weight.shape[1], device=x.weight.device) for n, x in downs.items()
    }

    def watch(name: str) -> Callable[[QuantizedLinear, tuple[Tensor, ...]], None]:
        def hook(_: QuantizedLinear, inputs: tuple[Tensor, ...]) -> None:
            seen = inputs[0].detach().abs().flatten(0, -2).amax(dim=0).float()
            torch.maximum(amax[name], seen, out=amax[name])

        return hook

    handles = [x.register_forward_pre_hook(watch(n)) for n, x in downs.items()]
    try:
        with exact_forward(linears):
            run_batches()
    finally:
        for handle in handles:
            handle.remove()
    all_reduce_fused_(list(amax.values()), dist.ReduceOp.MAX, dp_group)
    with torch.no_grad():
        for name, down in downs.items():
            up = linears[name.removesuffix("linear_fc2") + "linear_fc1"].weight.chunk(2, dim=0)[1]
            scale = migration_scale(amax[name], down.weight.abs().amax(dim=0).float(), alpha)
            up.div_(scale[:, None].to(up.dtype))
            down.weight.mul_(scale.to(down.weight.dtype))

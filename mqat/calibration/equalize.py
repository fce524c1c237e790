"""Moves activation outliers into weights without changing the function the model computes.

Dividing what feeds input channel `j` of a linear by `s_j` and multiplying column `j` of its weight by
`s_j` leaves the output as it was, while the input becomes easier to quantize per tensor:

    s_j = amax(x_j)**alpha / amax(W_j)**(1 - alpha)

This is SmoothQuant's migration (Xiao et al. 2023, arXiv:2211.10438, eq. 4), folded into the weight
before, so that nothing is added when serving. Factors are powers of two: folding is exact.

| input of     | `1 / s_j` goes into         | channels over TP | amax(x_j) over | amax(W_j) over |
|--------------|-----------------------------|------------------|----------------|----------------|
| `linear_qkv` | norm weight `j`             | replicated       | TP, DP         | TP             |
| `linear_fc1` | norm weight `j`             | replicated       | TP, DP         | TP             |
| `linear_fc2` | row `j` of the up weight    | cut              | DP             | -              |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mqat.calibration.statistics import exact_forward
from mqat.parallel.linear import quantized_linears
from mqat.parallel.reduce import all_reduce_fused_


@dataclass
class _Site:
    """One linear and the tensors before it that can take up `1 / s`."""

    weight: Tensor  # [O, I] of this rank
    before: Tensor  # [I], or [I, H] for rows of the up weight
    amax: Tensor  # of each input channel, float32 [I]
    is_cut: bool  # input channels differ between TP ranks


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


def _sites(chunks: list[Any]) -> dict[torch.nn.Module, _Site]:
    """The equalizable linears of this rank, in model order."""
    sites: dict[torch.nn.Module, _Site] = {}
    for chunk in chunks:
        for layer in getattr(chunk, "module", chunk).decoder.layers:
            fc1, fc2 = layer.mlp.linear_fc1, layer.mlp.linear_fc2
            up = fc1.weight.detach().chunk(2, dim=0)[1]
            for linear, before, is_cut in (
                (layer.self_attention.linear_qkv, layer.input_layernorm.weight, False),
                (fc1, layer.pre_mlp_layernorm.weight, False),
                (fc2, up, True),
            ):
                amax = torch.zeros(linear.weight.shape[1], device=linear.weight.device)
                sites[linear] = _Site(linear.weight.detach(), before.detach(), amax, is_cut)
    return sites


def _watch(site: _Site) -> Callable[[torch.nn.Module, tuple[Tensor, ...]], None]:
    def hook(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen = inputs[0].detach().abs().flatten(0, -2).amax(dim=0).float()
        torch.maximum(site.amax, seen, out=site.amax)

    return hook


def equalize_(
    chunks: list[Any],
    run_batches: Callable[[], None],
    *,
    tp_group: dist.ProcessGroup,
    dp_group: dist.ProcessGroup,
    alpha: float = 0.8,
) -> None:
    """Rescales norms, up weights and the columns of qkv, fc1 and fc2 in place.

    Args:
        chunks: Model chunks of this rank, with quantized linears; not yet calibrated.
        run_batches: Runs the calibration forward passes (all ranks).
        tp_group: Tensor-parallel group.
        dp_group: Data-parallel group, with context parallelism.
        alpha: Migration strength in [0, 1].

    Raises:
        ValueError: `alpha` is out of range.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"quantization.equalize_alpha={alpha} must be in [0, 1].")
    sites = _sites(chunks)
    handles = [linear.register_forward_pre_hook(_watch(site)) for linear, site in sites.items()]
    try:
        with exact_forward(quantized_linears(chunks)):
            run_batches()
    finally:
        for handle in handles:
            handle.remove()
    columns = {linear: site.weight.abs().amax(dim=0).float() for linear, site in sites.items()}
    whole = [linear for linear, site in sites.items() if not site.is_cut]
    over_tp = [*(sites[linear].amax for linear in whole), *(columns[linear] for linear in whole)]
    all_reduce_fused_(over_tp, dist.ReduceOp.MAX, tp_group)
    all_reduce_fused_([site.amax for site in sites.values()], dist.ReduceOp.MAX, dp_group)
    for linear, site in sites.items():
        scale = migration_scale(site.amax, columns[linear], alpha)
        before = scale[:, None] if site.before.dim() == 2 else scale
        site.before.div_(before.to(site.before.dtype))
        site.weight.mul_(scale.to(site.weight.dtype))

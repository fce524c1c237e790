"""Factors of an input's channels: the best of many candidates by the layer's output error.

    SmoothQuant's                                        `smoothquant.py`
    s_j = rms(x_j)**alpha                                AWQ, arXiv:2306.00978, eq. 5 (rms for mean |x|)

A candidate's loss is the squared error of the layer's output over all calibration tokens:

    tr(D XᵀX Dᵀ)                            rounding of the weight, D = (Q(W s) - W s) / s; exact
    sum_j min(XᵀX_jj, T a² s_j² / 12) |W_j|²      rounding of an integer input with the one scale `a`:
                                            uniform noise, but never more than losing the channel

Legend: `I` input features, `C` candidates, `T` tokens; a shard is [rows, I]
(`tp_invariant_shards.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mqat.calibration.smoothquant import FLOOR, round_scale, smoothquant_scale
from mqat.quant.qparams import rounded
from mqat.quant.scales import divide
from mqat.quant.scheme import TensorScheme

# A factor belongs to an input channel, which all rows share: a part of them orders candidates as well.
_ROW_STRIDE = 8


@dataclass(frozen=True)
class InputStatistics:
    """Merged statistics of one linear's input, the same on every rank.

    Attributes:
        hessian: XᵀX, float64 [I, I].
        amax: Largest |x_j|, float32 [I].
        tokens: T.
    """

    hessian: Tensor
    amax: Tensor
    tokens: int


def candidate_scales(
    input_amax: Tensor, weight_amax: Tensor, input_rms: Tensor, *, search_steps: int, sq_grid: str
) -> Tensor:
    """Factors to try, float32 [C, I]; the first row leaves everything as it is.

    From the largest |x_j| and |W_oj| and the root of the mean x_j² of each channel, float32 [I], and
    `search_steps` alphas between 0 and 1 in each of the two families.
    """
    rows = [torch.ones_like(input_amax)]
    for number in range(search_steps + 1):
        alpha = number / search_steps
        rows.append(smoothquant_scale(input_amax, weight_amax, alpha))
        rows.append(input_rms.clamp_min(FLOOR) ** alpha)
    return torch.unique_consecutive(round_scale(torch.stack(rows), sq_grid), dim=0)


def _input_noise(inputs: InputStatistics, scale: Tensor, scheme: TensorScheme) -> Tensor:
    """Expected squared rounding error of input channel j over all tokens, in units of x; [I]."""
    input_scale = divide((inputs.amax / scale).amax().double(), scheme.format.max_value)
    uniform = divide(inputs.tokens * input_scale.square(), 12) * scale.double().square()
    return torch.minimum(inputs.hessian.diagonal(), uniform)


def shard_losses(
    shards: Sequence[Tensor],
    inputs: InputStatistics,
    scales: Tensor,
    weight: TensorScheme | None,
    operand: TensorScheme | None,
) -> Tensor:
    """Output error of each candidate on every eighth row of this rank's shards, float64 [C, shards].

    `scales` are the candidates, [C, I]; `weight` and `operand` (the input) are None if not quantized.
    What a whole weight shares (a scale per tensor, the upper of two levels) is taken from each shard,
    which orders candidates alike. Dynamic inputs count as exact: their scales follow each token.
    """
    hessian, sampled = inputs.hessian.float(), [shard[::_ROW_STRIDE] for shard in shards]
    losses = torch.zeros(len(scales), len(shards), dtype=torch.float64, device=hessian.device)
    for i, scale in enumerate(scales):
        noise = None
        if operand is not None and not (operand.format.is_float or operand.is_dynamic):
            noise = _input_noise(inputs, scale, operand)
        for j, shard in enumerate(sampled):
            if weight is not None:
                scaled = shard * scale
                error = (rounded(scaled, weight) - scaled) / scale
                losses[i, j] += ((error @ hessian) * error).sum(dim=1).double().sum()
            if noise is not None:
                losses[i, j] += (shard.double().square().sum(dim=0) * noise).sum()
    return losses


def best_candidate(losses: Tensor) -> int:
    """Row with the smallest total, summed over shards in their global order; the first on a tie."""
    return int(losses.sum(dim=1).argmin())

"""Factors of an input's channels: the best of many candidates by the layer's output error.

    SmoothQuant's                                        `smoothquant.py`
    s_j = rms(x_j)**alpha                                AWQ, arXiv:2306.00978, eq. 5 (rms for mean |x|)

A candidate's loss is the squared error of the layer's output over all calibration tokens:

    tr(D XᵀX Dᵀ)                            rounding of the weight, D = (Q(W s) - W s) / s; exact
    sum_j n_j |W_j|²                        rounding of an input: uniform noise, but never more than
                                            losing the channel
      n_j = min(XᵀX_jj, u_j)                integers with the one scale `a`, u_j = T a² s_j² / 12
      n_j = 1 / (1 / XᵀX_jj + 1 / u_j)      blocks with scales of their own (NVFP4, MX), whose steps vary
                                            from token to token: u_j = A d² s_j² / 12

`d` is the smallest step of the format as a share of its largest value, the same for every element next
to zero. `A` stands for the sum over tokens of the block's squared maximum, of which only sums over
tokens are known: sqrt(sum_k (XᵀX_kk / s_k²)²) over the channels k of the block. That is right where one
channel is always the largest, and near it for 16 or 32 channels of normal numbers. Larger elements of
floating-point formats have an error in proportion to themselves, whatever the factor.

Legend: `I` input features, `C` candidates, `T` tokens; a shard is [rows, I]
(`tp_invariant_shards.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mqat.calibration.smoothquant import FLOOR, round_scale, smoothquant_scale
from mqat.quant.granularity import PerGroup
from mqat.quant.qparams import rounded
from mqat.quant.scales import divide
from mqat.quant.scheme import TensorScheme

# A factor belongs to an input channel, which all rows share: a part of them orders candidates as well.
_ROW_STRIDE = 8
_TINY = torch.finfo(torch.float64).tiny  # of channels that are always zero


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


def _input_noise(inputs: InputStatistics, scale: Tensor, scheme: TensorScheme) -> Tensor | None:
    """Expected squared rounding error of input channel j over all tokens, in units of x; [I].

    None: it counts as exact.
    """
    squares, fmt, factors = inputs.hessian.diagonal(), scheme.format, scale.double().square()
    if isinstance(scheme.granularity, PerGroup):
        of_blocks = scheme.granularity.largest((squares / factors).square(), torch.sum).sqrt()
        of_channels = scheme.granularity.expand(of_blocks, tuple(squares.shape))
        uniform = divide(of_channels * (fmt.smallest_step / fmt.max_value) ** 2, 12) * factors
        return squares * uniform / (squares + uniform).clamp_min(_TINY)
    if fmt.is_float or scheme.is_dynamic:
        return None
    input_scale = divide((inputs.amax / scale).amax().double(), fmt.max_value)
    return torch.minimum(squares, divide(inputs.tokens * input_scale.square(), 12) * factors)


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
    which orders candidates alike. Inputs with a scale for each token count as exact, and floating-point
    ones without blocks.
    """
    hessian, sampled = inputs.hessian.float(), [shard[::_ROW_STRIDE] for shard in shards]
    losses = torch.zeros(len(scales), len(shards), dtype=torch.float64, device=hessian.device)
    for i, scale in enumerate(scales):
        noise = None if operand is None else _input_noise(inputs, scale, operand)
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

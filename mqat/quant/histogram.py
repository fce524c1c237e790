"""Clipping points from a histogram of magnitudes: percentile, least squared error, least entropy.

Bins are the upper magnitude bits of float32 (8 of exponent, 7 of mantissa). They do not depend on the
data, so counts of different batches and ranks are added, and what is computed here from the merged
counts is the same on every layout.

`counts` are int64 (BINS,), merged over ranks; `maximum`, never exceeded, and the points found are
float32 (1,). A legend for shapes: `B` non-empty bins, `C` candidates for the clipping point.
"""

import math

import torch
from torch import Tensor

from mqat.quant.formats import QuantFormat
from mqat.quant.functional import fake_quantize
from mqat.quant.granularity import PerChannel
from mqat.quant.scales import compute_scale

BINS = 1 << 15
FIRST_NONFINITE_BIN = 0xFF << 7
_CANDIDATES_PER_OCTAVE = 16
_OCTAVES = 10
# Where the error inside a bin is sampled: bins near the largest code are half a step wide.
_POINTS = 4


def bin_of(magnitude: Tensor) -> Tensor:
    """Bin number of each |x|, int32, flat."""
    return (magnitude.float().reshape(-1).view(torch.int32) >> 16) & (BINS - 1)


def edges(bins: Tensor) -> Tensor:
    """Lower edge of each bin, float32; the upper edge is the next bin's lower one."""
    return (bins.to(torch.int32) << 16).view(torch.float32)


def percentile_amax(counts: Tensor, maximum: Tensor, percentile: float) -> Tensor:
    """Upper edge of the first bin at which the cumulative share reaches `percentile`, in (0, 100].

    At most 1/128 of itself above the exact percentile.
    """
    finite = counts[:FIRST_NONFINITE_BIN].cpu()
    needed = math.ceil(int(finite.sum()) * percentile / 100)
    first = torch.searchsorted(finite.cumsum(0), needed).reshape(1)
    return torch.minimum(maximum, edges(first + 1).to(maximum.device))


def _occupied(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Non-empty finite bins above zero, int64 [B], and their counts, float64 [B]."""
    finite = counts[:FIRST_NONFINITE_BIN].cpu()
    bins = finite.nonzero().flatten()
    bins = bins[bins > 0]
    return bins, finite[bins].double()


def _candidates(maximum: Tensor) -> Tensor:
    """Clipping points from the maximum down, float32 [C]; the first is the maximum."""
    steps = torch.arange(_OCTAVES * _CANDIDATES_PER_OCTAVE, dtype=torch.float64)
    shrink = torch.exp2(-steps / _CANDIDATES_PER_OCTAVE)
    return (maximum.cpu().double() * shrink).float()


def mse_amax(counts: Tensor, maximum: Tensor, fmt: QuantFormat) -> Tensor:
    """Clipping point with the least squared error of rounding and clipping, in any symmetric format.

    Candidates are 1/16 octave apart, from the maximum down; `fake_quantize` itself quantizes.
    """
    bins, weight_B = _occupied(counts)  # noqa: N806
    if not len(bins):
        return maximum.clone()
    lower, upper = edges(bins).double(), edges(bins + 1).double()
    inside = (torch.arange(_POINTS, dtype=torch.float64) + 0.5) / _POINTS
    points = (lower[:, None] + (upper - lower)[:, None] * inside).float().flatten()
    candidates_C = _candidates(maximum)  # noqa: N806
    scale_C = compute_scale(candidates_C, fmt)  # noqa: N806
    rows = points.expand(len(candidates_C), -1).contiguous()
    error = (fake_quantize(rows, scale_C, fmt, PerChannel()) - rows).double().square()
    error_C = error.view(len(candidates_C), -1, _POINTS).mean(dim=2) @ weight_B  # noqa: N806
    return candidates_C[error_C.argmin()].reshape(1).to(maximum.device)


def entropy_amax(counts: Tensor, maximum: Tensor, fmt: QuantFormat) -> Tensor:
    """Clipping point whose quantized distribution diverges least from the clipped original.

    For each candidate, the reference P is the histogram with everything beyond the candidate added to
    its last bin; Q merges the bins below it that share a code and spreads each code's mass over its
    non-empty bins, in proportion to their width. KL(P || Q) decides. The format is any symmetric one.

    Reference:
        Migacz 2017, "8-bit Inference with TensorRT" (GTC S7310), there with 2048 even bins.
    """
    bins, weight_B = _occupied(counts)  # noqa: N806
    if not len(bins):
        return maximum.clone()
    lower, width_B = edges(bins), (edges(bins + 1).double() - edges(bins).double())  # noqa: N806
    best, best_divergence = maximum.cpu(), math.inf
    for candidate in _candidates(maximum):
        kept = int((lower < candidate).sum())
        if kept == 0:
            break
        p = weight_B[:kept].clone()
        p[-1] += weight_B[kept:].sum()
        middle = (lower[:kept] + 0.5 * width_B[:kept].float())[None]
        scale = compute_scale(candidate.reshape(1), fmt)
        code_values = fake_quantize(middle, scale, fmt, PerChannel())[0]
        codes = torch.unique(code_values, return_inverse=True)[1]
        mass = torch.zeros(int(codes.max()) + 1, dtype=torch.float64)
        room = mass.clone()
        mass.index_add_(0, codes, weight_B[:kept])
        room.index_add_(0, codes, width_B[:kept])
        q = (mass / room)[codes] * width_B[:kept]
        p, q = p / p.sum(), q / q.sum()
        divergence = float((p * (p / q).log()).sum())
        if divergence < best_divergence:
            best, best_divergence = candidate, divergence
    return best.reshape(1).to(maximum.device)

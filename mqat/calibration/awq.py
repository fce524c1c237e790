"""`awq`: the share of the maximum with the least output error d G dᵀ, G the group's part of XᵀX.

AWQ's clip search (arXiv:2306.00978, section 3.2) with exact output errors.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from mqat.calibration.clipping import ClippingMethod, WeightShard
from mqat.calibration.mse import HEADROOM, best_share, rounding_errors


def _diagonal_parts(hessian: Tensor, width: int) -> Tensor:
    """XᵀX of the channels of each group, float32 [G, width, width]."""
    padding = -hessian.shape[0] % width
    padded = F.pad(hessian.float(), (0, padding, 0, padding))
    count = padded.shape[0] // width
    parts = padded.view(count, width, count, width)
    return parts[torch.arange(count), :, torch.arange(count)].contiguous()


def output_errors(shard: WeightShard) -> Tensor:
    """Squared output error of each share and row group, float64 [shares, rows, G]."""
    assert shard.hessian is not None, "the method asks for it"
    parts = _diagonal_parts(shard.hessian, shard.group_width)
    found = []
    for error in rounding_errors(shard):
        weighted = torch.bmm(error.transpose(0, 1).contiguous(), parts).transpose(0, 1)
        found.append((weighted * error).sum(dim=2).double())
    return torch.stack(found)


AWQ = ClippingMethod(output_errors, best_share, needs_input_hessian=True, headroom=HEADROOM)

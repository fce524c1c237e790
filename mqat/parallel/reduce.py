"""Merging calibration statistics over ranks: one collective per kind of statistic, no arithmetic.

Every statistic is a maximum or an integer count, so the result does not depend on the layout. All
ranks of a pipeline stage that hold part of the same layers (TP x DP x CP) form one group.

| tensor                       | per tensor        | per channel (out) | per group or square  |
|------------------------------|-------------------|-------------------|----------------------|
| column-parallel weight       | MAX over TP       | local             | local                |
| row-parallel weight          | MAX over TP       | MAX over TP       | local                |
| global scale of two levels   | MAX over TP       |                   |                      |
| input of either              | MAX over TP, DP, CP (histograms: SUM)                            |
| cached keys and values       | the same: heads are cut over TP                                  |
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def all_reduce_fused_(
    tensors: Sequence[Tensor], op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup
) -> None:
    """Reduces all tensors in place with a single collective: MAX for maxima and flags, SUM for counts.

    Every rank passes the same shapes; all have one dtype and device. With one member nothing is sent.
    """
    if not tensors or group.size() == 1:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat, op=op, group=group)
    sizes = [tensor.numel() for tensor in tensors]
    for tensor, reduced in zip(tensors, flat.split(sizes), strict=True):
        tensor.copy_(reduced.view_as(tensor))

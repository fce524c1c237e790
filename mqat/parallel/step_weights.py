"""Weights quantized once per optimizer step, and the rule for when that is still valid."""

import torch
from torch import Tensor

from mqat.parallel.quantized_gemm import GemmKind, StepWeight, encode_weight
from mqat.quant.quantizer import Quantizer


class WeightCache:
    """One linear's quantized weight, for the length of one `quantized_step`.

    The scope is the guarantee: it ends before the optimizer runs. Version counters could not be one,
    because the distributed optimizer writes through views that do not share them. They are compared
    nevertheless, so that an ordinary in-place change inside the scope is noticed.

    Attributes:
        for_backward: Masks are wanted even when the first forward runs without a graph (recompute).
    """

    def __init__(self, *, for_backward: bool) -> None:
        self.for_backward = for_backward
        self._used: StepWeight | None = None
        self._versions = (-1, -1)

    def get(self, weight: Tensor, quantizer: Quantizer, kind: GemmKind) -> StepWeight:
        """Quantizes at the first forward of the step, not before.

        Overlapped parameter all-gathers write the weights just before that forward.
        """
        versions = (weight._version, quantizer.scale._version)
        with_mask = weight.requires_grad and (self.for_backward or torch.is_grad_enabled())
        used = self._used
        if used is None or versions != self._versions or (with_mask and used.mask is None):
            used = encode_weight(
                weight, quantizer.scale, quantizer.scheme, kind, with_mask=with_mask
            )
            self._used, self._versions = used, versions
        return used

    @property
    def num_bytes(self) -> int:
        """Memory held now."""
        return 0 if self._used is None else self._used.num_bytes

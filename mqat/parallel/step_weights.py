"""Weights quantized once per optimizer step: in which form, by scheme, and for how long that is valid.

| input                   | weight                | kept of the weight | forward                       |
|-------------------------|-----------------------|--------------------|-------------------------------|
| INT8, tensor or token   | INT8 per channel      | codes, mask        | integer GEMM, then the scales |
| FP8, tensor or token    | FP8 tensor or channel | codes, mask        | GEMM of codes, then scales    |
| any other, or none      | any other             | values, mask       | GEMM of dequantized operands  |
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from mqat.kernels.operators import apply_mask_, encode, fake_quantize_with_mask
from mqat.kernels.reference import pack_mask
from mqat.kernels.stored import Stored
from mqat.parallel.lora import Adapter
from mqat.quant.formats import FP8_E4M3, INT8_FORMATS
from mqat.quant.functional import fake_quantize
from mqat.quant.granularity import PerChannel, PerTensor, PerToken
from mqat.quant.quantizer import Quantizer
from mqat.quant.scheme import LinearScheme, TensorScheme


class GemmKind(Enum):
    """How operands are multiplied."""

    CODES = "codes"  # both operands as codes, the result scaled
    VALUES = "values"  # dequantized operands


def encodes_input(operand: TensorScheme | None) -> bool:
    """Whether an input is kept as codes: 8 bits, static per tensor or dynamic per token."""
    if operand is None:
        return False
    is_static = operand.granularity == PerTensor() and not operand.is_asymmetric
    is_per_token = operand.granularity == PerToken() and operand.is_dynamic
    return operand.format in (*INT8_FORMATS, FP8_E4M3) and (is_static or is_per_token)


def gemm_kind(scheme: LinearScheme | None) -> GemmKind | None:
    """How a scheme's GEMM is computed; None: the weight is not quantized, so nothing is kept of it."""
    if scheme is None or scheme.weight is None:
        return None
    weight, operand = scheme.weight, scheme.input
    if operand is None or not encodes_input(operand):
        return GemmKind.VALUES
    is_per_row = isinstance(weight.granularity, (PerChannel, PerTensor))
    is_int8 = operand.format in INT8_FORMATS and weight.format in INT8_FORMATS
    is_fp8 = operand.format == FP8_E4M3 and weight.format == FP8_E4M3
    is_plain = not (operand.is_asymmetric or weight.is_asymmetric)
    if is_per_row and is_plain and (is_int8 or (is_fp8 and weight.ste_clip_range is None)):
        return GemmKind.CODES
    return GemmKind.VALUES


@dataclass(frozen=True)
class StepWeight(Stored):
    """A weight as an optimizer step uses it; shared by all microbatches and by recompute.

    Attributes:
        operand: Codes (`GemmKind.CODES`), or dequantized values in the parameter's dtype.
        scale: float32 (O,) or (1,) with codes; None with values.
        mask: Packed bits, 1 where the weight was not clipped; None: no gradient was wanted.
    """

    operand: Tensor
    scale: Tensor | None
    mask: Tensor | None


@torch.no_grad()
def encode_weight(
    weight: Tensor, quantizer: Quantizer, kind: GemmKind, *, with_mask: bool
) -> StepWeight:
    """Quantizes a weight [O, I] for as long as it does not change."""
    scale, zero_point = quantizer.qparams(weight)
    scheme = quantizer.scheme
    fmt, granularity, ste_clip_range = scheme.format, scheme.granularity, scheme.ste_clip_range
    if kind is GemmKind.CODES:
        encoded = encode(
            weight, scale, fmt, granularity, with_mask=with_mask, ste_clip_range=ste_clip_range
        )
        return StepWeight(encoded.codes, encoded.scale, encoded.mask)
    if with_mask and zero_point is None:
        values, mask = fake_quantize_with_mask(
            weight, scale, fmt, granularity, ste_clip_range=ste_clip_range
        )
        return StepWeight(values, None, mask)
    leaf = weight.detach().requires_grad_(with_mask)
    with torch.set_grad_enabled(with_mask):
        values = fake_quantize(
            leaf, scale, fmt, granularity, zero_point=zero_point, ste_clip_range=ste_clip_range
        )
    if not with_mask:
        return StepWeight(values, None, None)
    (passed,) = torch.autograd.grad(values, leaf, torch.ones_like(values))
    return StepWeight(values.detach(), None, pack_mask(passed.bool()))


def _is_added_to_elsewhere(weight: Tensor) -> bool:
    """Whether gradients that no mask applies to may come to the weight, or it has none of its shape.

    Embeddings tied to an output layer; Megatron-FSDP's shards.
    """
    names = ("shared_embedding", "zero_out_wgrad", "__fsdp_param__")
    return any(getattr(weight, name, False) for name in names)


class WeightCache:
    """One linear's quantized weight, for the length of one `quantized_step`.

    The scope is the guarantee: it ends before the optimizer runs. Version counters could not be one,
    because the distributed optimizer writes through views that do not share them. They are compared
    nevertheless, so that an ordinary in-place change inside the scope is noticed.

    The memory is given back when the scope ends, so the optimizer and evaluation have it.

    A weight that does not change has one mask, so masking the sum of its gradients gives the same bits
    as summing masked ones: that is done once, when the scope ends.

    Attributes:
        is_open: Inside the scope.
        for_backward: Masks are wanted even when the first forward runs without a graph (recompute).
        number: Of the scope; backward of an earlier one is refused.
    """

    def __init__(self) -> None:
        self.is_open = self.for_backward = False
        self.number = 0
        self._used: StepWeight | None = None
        self._versions: tuple[int, ...] = ()
        self._owes_mask = False

    def open(self, *, for_backward: bool) -> None:
        """Begins a scope: whatever was quantized before is out of date."""
        self.is_open, self.for_backward = True, for_backward
        self.number += 1

    def close(self) -> None:
        """Ends it and gives the memory back."""
        self.is_open = self._owes_mask = False
        self._used = None

    def get(
        self,
        weight: Tensor,
        quantizer: Quantizer,
        kind: GemmKind,
        adapter: Adapter | None = None,
    ) -> StepWeight:
        """Quantizes at the first forward of the step, not before; with the adapter merged, if any.

        Overlapped parameter all-gathers write the weights just before that forward.
        """
        versions: tuple[int, ...] = (weight._version, quantizer.scale._version)
        is_trained = weight.requires_grad or adapter is not None
        with_mask = is_trained and (self.for_backward or torch.is_grad_enabled())
        if adapter is not None:
            versions += adapter.versions
        used = self._used
        if used is None or versions != self._versions or (with_mask and used.mask is None):
            self.mask_gradient_(weight)
            value = weight if adapter is None else adapter.merged(weight)
            used = encode_weight(value, quantizer, kind, with_mask=with_mask)
            self._used, self._versions = used, versions
        return used

    def masks_later(self, weight: Tensor, used: StepWeight) -> bool:
        """Whether a gradient through `used` may be added unmasked; it is then masked with the sum."""
        is_owed = (
            self.is_open
            and self.for_backward
            and used is self._used
            and used.mask is not None
            and weight.is_leaf  # else its gradient goes on, to an adapter's
            and not _is_added_to_elsewhere(weight)
        )
        self._owes_mask |= is_owed
        return is_owed

    def mask_gradient_(self, weight: Any) -> None:
        """Masks the gradients that `masks_later` has let pass, wherever they have been added up."""
        if not self._owes_mask:
            return
        assert self._used is not None, "masks_later() has seen it"
        for total in (getattr(weight, "main_grad", None), weight.grad):
            if total is not None:
                apply_mask_(total, self._used.mask, None)
        self._owes_mask = False

    @property
    def num_bytes(self) -> int:
        """Memory held now."""
        return 0 if self._used is None else self._used.num_bytes

"""A linear's input as its GEMM takes it, here or gathered over sequence-parallel ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mqat.kernels.operators import decode, encode, fake_quantize_with_mask, swiglu_encode
from mqat.parallel.step_weights import encodes_input
from mqat.quant.granularity import Granularity, PerToken
from mqat.quant.scheme import TensorScheme


def _gather_tokens(
    local: Tensor, group: dist.ProcessGroup, *, async_op: bool = False
) -> tuple[Tensor, Any]:
    """All-gathers along the first dimension; one-byte codes travel as bytes. Returns the handle."""
    shape = (local.shape[0] * group.size(), *local.shape[1:])
    full = torch.empty(shape, dtype=local.dtype, device=local.device)
    sent, received = local.contiguous(), full
    if local.element_size() == 1:
        sent, received = sent.view(torch.uint8), full.view(torch.uint8)
    handle = dist.all_gather_into_tensor(received, sent, group=group, async_op=async_op)
    return full, handle


@dataclass(frozen=True)
class Operand:
    """An input as this rank has it or, once gathered, of all tokens.

    Attributes:
        x: Codes with `scale`, floats without.
        scale: float32 (1,), or [S, B] with a step per token.
        zero_point: int32, shaped like `scale`, of asymmetric codes.
        granularity: Of the scale; None without.
    """

    x: Tensor
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    granularity: Granularity | None = None

    @property
    def rows(self) -> Tensor:
        """Codes or floats as [N, I]."""
        return self.x.reshape(-1, self.x.shape[-1])

    def values(self, dtype: torch.dtype) -> Tensor:
        """In floats."""
        if self.scale is None or self.granularity is None:
            return self.x.to(dtype)
        return decode(
            self.x,
            dtype,
            scale=self.scale,
            granularity=self.granularity,
            zero_point=self.zero_point,
        )

    def gathered(
        self, group: dist.ProcessGroup, *, async_op: bool = False
    ) -> tuple[Operand, list[Any]]:
        """Of all sequence-parallel ranks, and handles to wait for."""
        handles, parts = [], []
        for part in (self.x, self.scale, self.zero_point):
            if part is not None and (part is self.x or self.granularity == PerToken()):
                part, handle = _gather_tokens(part, group, async_op=async_op)
                handles.append(handle)
            parts.append(part)
        x, scale, zero_point = parts
        assert x is not None, "gathered"
        return Operand(x, scale, zero_point, self.granularity), [
            h for h in handles if h is not None
        ]


def _clips(scheme: TensorScheme) -> bool:
    return scheme.ste_clip_range is None or math.isfinite(scheme.ste_clip_range)


def encode_input(
    x: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    scheme: TensorScheme,
    *,
    wants_dx: bool,
) -> tuple[Operand, Tensor | None]:
    """An input's codes or, of formats that are multiplied as floats, its quantized values.

    Second: the mask of its gradient where it may be clipped.
    """
    assert scale is not None, "a quantized input has a scale"
    with_mask = wants_dx and _clips(scheme)
    if not encodes_input(scheme):
        values, mask = fake_quantize_with_mask(
            x, scale, scheme.format, scheme.granularity, ste_clip_range=scheme.ste_clip_range,
            with_mask=with_mask,
        )  # fmt: skip
        return Operand(values), mask
    encoded = encode(
        x, scale, scheme.format, scheme.granularity,
        with_mask=with_mask, zero_point=zero_point, ste_clip_range=scheme.ste_clip_range,
    )  # fmt: skip
    return Operand(encoded.codes, encoded.scale, zero_point, scheme.granularity), encoded.mask


def encode_activated(
    x: Tensor, scale: Tensor | None, scheme: TensorScheme | None, *, wants_dx: bool
) -> tuple[Operand, Tensor | None]:
    """`encode_input` of what SwiGLU makes of [..., gate | up], by one kernel; one static step."""
    assert scale is not None and scheme is not None, "fuses_activation() holds"
    encoded = swiglu_encode(
        x, scale, scheme.format,
        with_mask=wants_dx and _clips(scheme), ste_clip_range=scheme.ste_clip_range,
    )  # fmt: skip
    return Operand(encoded.codes, encoded.scale, None, scheme.granularity), encoded.mask

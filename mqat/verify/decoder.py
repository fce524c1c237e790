"""The parts of a Llama decoder that no layout and no format changes, in float32.

Sources: TensorRT-LLM `layers/attention.py`; Llama 3's rotary scaling as in transformers'
`modeling_rope_utils.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm, x / rms(x) * weight, along the last dimension."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight.float()


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding, half rotation (GPT-NeoX).

    Attributes:
        head_size: d, which every head is rotated in.
        base: Of the frequencies.
        scaling: Llama 3's factors, or None.
    """

    head_size: int
    base: float
    scaling: Mapping[str, Any] | None

    def _inverse_frequencies(self) -> Tensor:
        inverse = 1.0 / float(self.base) ** (
            torch.arange(0, self.head_size, 2).float() / self.head_size
        )
        if self.scaling is None:
            return inverse
        low, high = self.scaling["low_freq_factor"], self.scaling["high_freq_factor"]
        context = self.scaling["original_max_position_embeddings"]
        wavelength = 2 * math.pi / inverse
        smooth = ((context / wavelength - low) / (high - low)).clamp(0, 1)
        return (1 - smooth) * inverse / self.scaling["factor"] + smooth * inverse

    def rotate(self, x: Tensor) -> Tensor:
        """Rotates [b, heads, s, d] by its positions 0..s-1."""
        angles = torch.arange(x.shape[2]).float()[:, None] * self._inverse_frequencies()
        cos, sin = (f(torch.cat([angles, angles], dim=-1)) for f in (torch.cos, torch.sin))
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin


@dataclass(frozen=True)
class Cache:
    """A quantized key/value cache.

    Attributes:
        is_float: FP8 E4M3 codes; otherwise INT8.
        key_scale: Dequantization step of rotated keys, one number.
        value_scale: Of values.
    """

    is_float: bool
    key_scale: Tensor
    value_scale: Tensor

    def _stored(self, x: Tensor, scale: Tensor) -> Tensor:
        if self.is_float:
            return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
        return (x / scale).round().clamp(-128, 127) * scale

    def store(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """What reading the cache returns after rotated keys and values were written to it."""
        return self._stored(key, self.key_scale), self._stored(value, self.value_scale)


def attend(
    query: Tensor, key: Tensor, value: Tensor, rope: Rope, cache: Cache | None = None
) -> Tensor:
    """Causal attention of [b, s, heads * d] with grouped keys and values [b, s, kv * d]."""
    batch, length, _ = query.shape
    q, k, v = (
        part.view(batch, length, -1, rope.head_size).transpose(1, 2) for part in (query, key, value)
    )
    q, k = rope.rotate(q), rope.rotate(k)
    if cache is not None:
        k, v = cache.store(k, v)
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    context = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return context.transpose(1, 2).reshape(batch, length, -1)

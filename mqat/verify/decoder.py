"""Runs an exported directory: a small decoder in float32 that reads its tensors and nothing else.

It computes what servers compute: rank by rank, with partial sums over tensor-parallel ranks and one
pipeline stage after the other, activations quantized as served. A module is in memory at a time.

Sources: TensorRT-LLM `layers/attention.py`, `layers/mlp.py`, `quantization/layers.py`; Llama 3's rotary
scaling as in transformers' `modeling_rope_utils.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from mqat.verify.export import Export, Rank
from mqat.verify.reference_quant import quantize_input


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
    """Causal attention of heads [b, s, h, d] with grouped keys and values; [b, s, h * d]."""
    q, k, v = (part.transpose(1, 2) for part in (query, key, value))
    q, k = rope.rotate(q), rope.rotate(k)
    if cache is not None:
        k, v = cache.store(k, v)
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    context = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return context.transpose(1, 2).flatten(2)


class Decoder:
    """An exported model.

    Args:
        export: Its headers must have been checked.
    """

    def __init__(self, export: Export) -> None:
        self.export = export
        self.model = export.model
        self.rope = Rope(
            self.model.size("head_dim"), self.model.number("rope_theta"), self.model.rope_scaling
        )

    @property
    def max_positions(self) -> int:
        """Longest sequence."""
        return self.model.size("max_position_embeddings")

    def _linear(self, rank: Rank, prefix: str, module: str, x: Tensor) -> Tensor:
        """One rank's product, without the sum over ranks and without a bias."""
        linear = self.export.linear(rank, prefix, module)
        if "smoothing" in linear.tensors:
            x = x * linear.tensors["smoothing"].float()
        # A rank takes the step of a token from its own channels.
        x = quantize_input(x, linear.storage.input, linear.input_step())
        return x @ linear.weight().t()

    def _bias(self, rank: Rank, prefix: str, module: str) -> Tensor:
        has_bias = self.model.has_bias(module)
        return rank.tensor(f"{prefix}{module}.bias").float() if has_bias else torch.zeros(1)

    def _inner(self, rank: Rank, prefix: str, roles: Sequence[str], x: Tensor) -> list[Tensor]:
        """One rank's features of column-parallel linears."""
        found: dict[str, Tensor] = {}
        for module, served in self.model.modules.items():
            if not set(served) & set(roles):
                continue
            y = self._linear(rank, prefix, module, x) + self._bias(rank, prefix, module)
            found |= dict(zip(served, y.split(self.model.rows(module), dim=-1), strict=True))
        return [found[role] for role in roles]

    def _summed(
        self, ranks: Sequence[Rank], prefix: str, role: str, inner: Sequence[Tensor]
    ) -> Tensor:
        """A row-parallel linear of every rank's features; its bias is added once."""
        module = next(m for m, roles in self.model.modules.items() if role in roles)
        pairs = zip(ranks, inner, strict=True)
        total = sum(self._linear(rank, prefix, module, x) for rank, x in pairs)
        return total + self._bias(ranks[0], prefix, module)

    def _norm(self, rank: Rank, prefix: str, role: str, x: Tensor) -> Tensor:
        name = self.model.facts.norms[role][self.model.keys.form]
        return self._rms_norm(rank, f"{prefix}{name}.weight", x)

    def _rms_norm(self, rank: Rank, name: str, x: Tensor) -> Tensor:
        return rms_norm(x, rank.tensor(name), self.model.number("rms_norm_eps"))

    def _cache(self, rank: Rank, prefix: str) -> Cache | None:
        cache = self.export.description.cache
        if cache is None:
            return None
        key, value = (rank.tensor(prefix + cache.names[kind]) for kind in ("key", "value"))
        return Cache(cache.is_float, key, value)

    def _attention(self, rank: Rank, prefix: str, x: Tensor) -> Tensor:
        """One rank's heads, before the output's linear."""
        found = self._inner(rank, prefix, ("query", "key", "value"), x)
        parts = [part.unflatten(-1, (-1, self.rope.head_size)) for part in found]
        for number, norm in enumerate(("query_norm", "key_norm")):  # of each head, where there are
            if norm in self.model.facts.norms:
                parts[number] = self._norm(rank, prefix, norm, parts[number])
        query, key, value = parts
        return attend(query, key, value, self.rope, self._cache(rank, prefix))

    def _mlp(self, rank: Rank, prefix: str, x: Tensor) -> Tensor:
        gate, up = self._inner(rank, prefix, ("gate", "up"), x)
        return F.silu(gate) * up

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Next-token logits, float32 [b, s, V], for tokens int64 [b, s]."""
        model, stages = self.model, self.export.stages
        x = self.export.table("embedding", 0)[tokens].float()
        for ranks in stages:
            for layer in range(model.layers_per_stage):
                prefix = model.prefix(layer)
                normed = self._norm(ranks[0], prefix, "attention_norm", x)
                inner = [self._attention(rank, prefix, normed) for rank in ranks]
                x = x + self._summed(ranks, prefix, "output", inner)
                normed = self._norm(ranks[0], prefix, "mlp_norm", x)
                inner = [self._mlp(rank, prefix, normed) for rank in ranks]
                x = x + self._summed(ranks, prefix, "down", inner)
        x = self._rms_norm(stages[-1][0], f"{model.names['final_norm']}.weight", x)
        head = self.export.table(*(("embedding", 0) if model.is_tied else ("lm_head", -1)))
        return x @ head.float().t()

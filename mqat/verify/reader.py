"""Runs an exported directory: a small Llama decoder that reads the rank files and nothing else.

It computes, in float32, what a TensorRT-LLM engine computes: rank by rank, with partial sums over
tensor-parallel ranks and one pipeline stage after the other, activations quantized as served.
Sources: TensorRT-LLM `layers/attention.py`, `layers/mlp.py`, `quantization/layers.py`.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import load_file
from torch import Tensor

from mqat.verify.decoder import Cache, Rope, attend, rms_norm
from mqat.verify.expected import CACHE_SCALE
from mqat.verify.layout import INT4_ALGORITHMS, ServedConfig
from mqat.verify.operands import fp4_unpacked, fp4_values, served_input

Weights = dict[str, Tensor]

# Algorithm -> how it quantizes the input (`operands.served_input`).
_INPUTS = {
    "FP8": "static fp8",
    "FP8_PER_CHANNEL_PER_TOKEN": "token fp8",
    "W8A8_SQ_PER_CHANNEL": "static int8",
    "W4A16_AWQ": None,
    "W4A8_AWQ": "static fp8",
    "NVFP4": "block fp4",
}


def _int4_values(packed: Tensor, scale: Tensor) -> Tensor:
    """Weights [O, I] from bytes [O/2, I]; bit arithmetic of its own, on purpose."""
    unsigned = packed.view(torch.uint8).to(torch.int16)
    codes = torch.empty(2 * packed.shape[0], packed.shape[1])
    codes[0::2] = (unsigned % 16).float()
    codes[1::2] = (unsigned // 16).float()
    codes -= 16.0 * (codes >= 8)
    group_size = packed.shape[1] // scale.shape[1]
    return codes * scale.float().repeat_interleave(group_size, dim=1)


def _reload_w8a16(weight: Tensor) -> Tensor:
    """What the loader makes of an unquantized W8A16 weight: amax/128 of each output channel."""
    values = weight.float()
    scale = values.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 128
    return (values / scale).round().clamp(-128, 127) * scale


def _linear(config: ServedConfig, weights: Weights, module: str, x: Tensor) -> Tensor:
    """One rank's linear, without the sum over ranks and without a bias."""
    weight = weights[f"{module}.weight"]
    algorithm = config.algorithm_of(module)
    if algorithm is None:
        return x @ weight.float().t()
    if algorithm == "W8A16":
        return x @ _reload_w8a16(weight).t()
    if f"{module}.prequant_scaling_factor" in weights:
        x = x * weights[f"{module}.prequant_scaling_factor"].float()
    # A rank takes the step of a token from its own channels.
    x = served_input(x, _INPUTS[algorithm], weights.get(f"{module}.activation_scaling_factor"))
    if algorithm == "FP8_PER_CHANNEL_PER_TOKEN":
        return x @ (weight.float() * weights[f"{module}.per_channel_scale"][:, None]).t()
    scale = weights[f"{module}.weights_scaling_factor"].float()
    if algorithm in INT4_ALGORITHMS:
        return x @ _int4_values(weight, scale).t()
    if algorithm == "NVFP4":
        steps = scale.repeat_interleave(16, dim=1) * weights[f"{module}.weights_scaling_factor_2"]
        return x @ (fp4_values(fp4_unpacked(weight)) * steps).t()
    return x @ (weight.float() * (scale if algorithm == "FP8" else scale[:, None])).t()


def _with_bias(weights: Weights, module: str, y: Tensor) -> Tensor:
    """Adds what all ranks hold of a row-parallel bias, or one rank's part of a column-parallel one."""
    bias = weights.get(f"{module}.bias")
    return y if bias is None else y + bias.float()


class RankReader:
    """An exported model, one pipeline stage in memory at a time.

    Args:
        directory: Checked by `checks.check_files` before.
        config: From `layout.read_config`.
    """

    def __init__(self, directory: Path, config: ServedConfig) -> None:
        self.directory = directory
        self.config = config

    def _stage(self, pp_rank: int) -> list[Weights]:
        first = pp_rank * self.config.tp
        return [
            load_file(str(self.directory / f"rank{first + r}.safetensors"))
            for r in range(self.config.tp)
        ]

    def _attention(self, ranks: list[Weights], prefix: str, x: Tensor) -> Tensor:
        config = self.config
        d = int(config.raw["head_size"])
        heads, kept = config.heads_per_rank, config.key_value_heads_per_rank
        rope = Rope(d, config.raw["rotary_base"], config.raw["rotary_scaling"])
        total = torch.zeros_like(x)
        for weights in ranks:
            name = f"{prefix}attention.qkv"
            qkv = _with_bias(weights, name, _linear(config, weights, name, x))
            q, k, v = qkv.split([heads * d, kept * d, kept * d], dim=-1)
            cache = None
            if config.kv_cache is not None:
                scale = weights[prefix + CACHE_SCALE]
                cache = Cache(config.kv_cache == "FP8", scale, scale)
            merged = attend(q, k, v, rope, cache)
            total += _linear(config, weights, f"{prefix}attention.dense", merged)
        return _with_bias(ranks[0], f"{prefix}attention.dense", total)

    def _mlp(self, ranks: list[Weights], prefix: str, x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for weights in ranks:
            # The graph computes proj(act(fc(x)) * gate(x)): `fc` is the activated branch.
            fc, gate = (
                _with_bias(weights, name, _linear(self.config, weights, name, x))
                for name in (f"{prefix}mlp.fc", f"{prefix}mlp.gate")
            )
            total += _linear(self.config, weights, f"{prefix}mlp.proj", F.silu(fc) * gate)
        return _with_bias(ranks[0], f"{prefix}mlp.proj", total)

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Next-token logits, float32 [b, s, V], for tokens int64 [b, s]."""
        config = self.config
        eps = float(config.raw["norm_epsilon"])
        x = torch.empty(0)
        for pp_rank in range(config.pp):
            ranks = self._stage(pp_rank)
            if pp_rank == 0:
                name = "transformer.vocab_embedding.weight"
                x = torch.cat([weights[name] for weights in ranks])[tokens].float()
            for layer in range(config.layers_per_stage):
                prefix = f"transformer.layers.{layer}."
                norm = ranks[0][f"{prefix}input_layernorm.weight"]
                x = x + self._attention(ranks, prefix, rms_norm(x, norm, eps))
                norm = ranks[0][f"{prefix}post_layernorm.weight"]
                x = x + self._mlp(ranks, prefix, rms_norm(x, norm, eps))
        x = rms_norm(x, ranks[0]["transformer.ln_f.weight"], eps)
        head = torch.cat([weights["lm_head.weight"].float() for weights in ranks])
        return (x @ head.t())[..., : int(config.raw["vocab_size"])]

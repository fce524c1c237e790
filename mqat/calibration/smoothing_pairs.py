"""Where the reciprocal of a linear's input scaling can go, so that the model's function stays.

Dividing what feeds input channel `j` by `s_j` and multiplying column `j` of the weight by `s_j` leaves
the output as it was. The division is folded into the tensor before, so nothing is added when serving:

| input of      | `1 / s_j` goes into                      | `s` is the same for                    |
|---------------|------------------------------------------|----------------------------------------|
| `linear_qkv`  | norm weight `j`                          | -                                      |
| `linear_proj` | row of the value head in the qkv weight  | the query heads that share a KV head   |
| `linear_fc1`  | norm weight `j`                          | -                                      |
| `linear_fc2`  | row `j` of the up weight                 | -                                      |

(and into the bias of those rows, where there is one)

Tensor parallelism: `s` is computed whole, [I], on every rank; a row-parallel linear and the rows before
it take this rank's slice. Attention mixes tokens, not channels of a head, so values can be scaled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mqat.parallel.linear import QuantizedLinear, QuantRowParallelLinear


@dataclass(frozen=True)
class SmoothingPair:
    """A linear and the tensor before it that takes up `1 / s`.

    Attributes:
        linear: Its columns are multiplied by `s`.
        before: Norm weight [I], or view of rows [..., H] of a weight; divided in place.
        before_bias: View of the bias of those rows, [...]; None: there is none.
        heads_per_group: Query heads that share a value head (`linear_proj`), otherwise 1.
        head_dim: Channels of a head.
    """

    linear: QuantizedLinear
    before: Tensor
    before_bias: Tensor | None = None
    heads_per_group: int = 1
    head_dim: int = 1

    def tied(self, per_channel: Tensor) -> Tensor:
        """The largest value among channels that must share a factor, at each of them; [I]."""
        if self.heads_per_group == 1:
            return per_channel
        heads = per_channel.view(-1, self.heads_per_group, self.head_dim)
        return heads.amax(dim=1, keepdim=True).expand_as(heads).reshape(-1)

    def fold_(self, scale: Tensor) -> None:
        """Multiplies the weight's columns by `scale` [I] and divides what is before by it."""
        tp_group = self.linear.tp_group
        local = scale
        if isinstance(self.linear, QuantRowParallelLinear):
            local = scale.chunk(tp_group.size())[tp_group.rank()]
        weight = self.linear.weight.detach()
        weight.mul_(local.to(weight.dtype))
        if self.before.dim() == 1:
            self.before.div_(local.to(self.before.dtype))
            return
        rows = local.view(-1, self.heads_per_group, self.head_dim)[:, 0]
        rows = rows.reshape(self.before.shape[:-1])
        self.before.div_(rows[..., None].to(self.before.dtype))
        if self.before_bias is not None:
            self.before_bias.div_(rows.to(self.before_bias.dtype))


def layer_number(name: str) -> int:
    """`decoder.layers.7.mlp.linear_fc1` -> 7."""
    return int(name.split(".")[2])


def find_smoothing_pairs(
    chunks: list[Any], *, fold_values: bool = True
) -> dict[str, SmoothingPair]:
    """The linears of this rank whose input can be rescaled, in model order, by quantized name.

    Args:
        chunks: Model chunks of this rank, with or without DDP wrapper.
        fold_values: Whether `linear_proj` is one of them.
    """
    pairs: dict[str, SmoothingPair] = {}
    for chunk in chunks:
        for layer in getattr(chunk, "module", chunk).decoder.layers:
            attention, mlp = layer.self_attention, layer.mlp
            qkv, proj = attention.linear_qkv, attention.linear_proj
            config = attention.config
            heads = config.num_attention_heads // config.num_query_groups
            width = config.kv_channels
            # Rows of the local qkv weight: per query group its query heads, key head, value head.
            grouped = qkv.weight.detach().view(-1, heads + 2, width, qkv.weight.shape[1])
            values, up_bias = None, None
            if qkv.bias is not None:
                values = qkv.bias.detach().view(-1, heads + 2, width)[:, -1]
            if mlp.linear_fc1.bias is not None:
                up_bias = mlp.linear_fc1.bias.detach().chunk(2)[1]
            up = mlp.linear_fc1.weight.detach().chunk(2, dim=0)[1]
            found = [SmoothingPair(qkv, layer.input_layernorm.weight.detach())]
            if fold_values:
                found.append(SmoothingPair(proj, grouped[:, -1], values, heads, width))
            found.append(SmoothingPair(mlp.linear_fc1, layer.pre_mlp_layernorm.weight.detach()))
            found.append(SmoothingPair(mlp.linear_fc2, up, up_bias))
            pairs |= {pair.linear.quantized_name: pair for pair in found}
    return pairs


def round_scale(scale: Tensor, grid: str) -> Tensor:
    """Factors as they will be folded, float32, centred on one.

    Args:
        scale: Positive factors [..., I]; a common factor does not matter.
        grid: `power_of_two`: folding changes no mantissa, so the unquantized function stays bit for
            bit. `float`: finer, but norm and weights are rounded again to their dtype.
    """
    log = torch.log2(scale.double())
    log = log - log.mean(dim=-1, keepdim=True)
    return torch.exp2(log.round() if grid == "power_of_two" else log).float()


def smooth_names(pairs: Mapping[str, SmoothingPair]) -> list[str]:
    """Names of linears with something to quantize: only these gain from rescaling."""
    return [name for name, pair in pairs.items() if pair.linear.quantizers]

"""Where the reciprocal of a linear's input scaling can go, so that the model's function stays.

Dividing what feeds input channel `j` by `s_j` and multiplying column `j` of the weight by `s_j` leaves
the output as it was. The division is folded into the tensor before, so nothing is added when serving.
The table of the model (`models/structure.py`) says which tensor that is:

| `norm` | `fed_by`   | `1 / s_j` goes into                           | `s` is the same for             |
|--------|------------|-----------------------------------------------|---------------------------------|
| given  | -          | norm weight and bias `j`                      | -                               |
| -      | up rows    | row `j` of the up weight, and its bias        | -                               |
| -      | value rows | row of the value head in the qkv weight, bias | query heads with one value head |

Tensor parallelism: `s` is computed whole, [I], on every rank; a row-parallel linear and the rows before
it take this rank's slice. Attention mixes tokens, not channels of a head, so values can be scaled.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mqat.errors import UserError
from mqat.models.decoder import DecoderConfig
from mqat.models.structure import Linear
from mqat.parallel.layout import local_pieces
from mqat.parallel.linear import QuantizedLinear, QuantRowParallelLinear
from mqat.parallel.quantized_module import unwrapped


@dataclass(frozen=True)
class SmoothingPair:
    """A linear and the tensor before it that takes up `1 / s`.

    Attributes:
        linear: Its columns are multiplied by `s`.
        before: Weight whose rows are divided in place: of a norm, [I], or of a linear, [O, H].
        before_bias: [I] or [O]; None: there is none.
        rows: Of `before` and its bias, in the order of the input channels, int64; None: all.
        offset: What the norm adds to its weight: 1 where that is zero-centred.
        heads_per_group: Heads of the input that share a head of rows (query heads), otherwise 1.
        head_dim: Channels of a head.
    """

    linear: QuantizedLinear
    before: Tensor
    before_bias: Tensor | None = None
    rows: Tensor | None = None
    offset: float = 0.0
    heads_per_group: int = 1
    head_dim: int = 1

    def tied(self, per_channel: Tensor) -> Tensor:
        """The largest value among channels that must share a factor, at each of them; [I]."""
        if self.heads_per_group == 1:
            return per_channel
        heads = per_channel.view(-1, self.heads_per_group, self.head_dim)
        return heads.amax(dim=1, keepdim=True).expand_as(heads).reshape(-1)

    def fold_(self, scale: Tensor) -> None:
        """Multiplies the weight's columns by `scale` [I] and divides what is before by it.

        By `scale` in the weight's dtype, on both sides.
        """
        tp_group = self.linear.tp_group
        local = scale
        if isinstance(self.linear, QuantRowParallelLinear):
            local = scale.chunk(tp_group.size())[tp_group.rank()]
        weight = self.linear.weight.detach()
        local = local.to(weight.dtype)
        weight.mul_(local)
        if self.heads_per_group > 1:
            local = local.view(-1, self.heads_per_group, self.head_dim)[:, 0].reshape(-1)
        for tensor, offset in ((self.before, self.offset), (self.before_bias, 0.0)):
            if tensor is None:
                continue
            rows = slice(None) if self.rows is None else self.rows
            factors = local.float().view(-1, *[1] * (tensor.dim() - 1))
            values = tensor[rows].float()
            divided = (values + offset) / factors - offset if offset else values / factors
            tensor[rows] = divided.to(tensor.dtype)


def find_smoothing_pairs(
    chunks: list[Any], names: Collection[str], model: DecoderConfig
) -> dict[str, SmoothingPair]:
    """The pairs of linears of these global names, in model order; other ranks' are passed over.

    Raises:
        UserError: The norm before is of an unknown kind; names it.
    """
    pairs: dict[str, SmoothingPair] = {}
    for chunk in unwrapped(chunks):
        for layer in chunk.decoder.layers:
            for linear in model.linears_of(layer.layer_number - 1):
                if linear.expert is not None:
                    continue  # no recipe rescales its input (`check_recipes`)
                module = layer.get_submodule(linear.name)
                if module.quantized_name not in names:
                    continue
                find = _behind_norm if linear.fed_by is None else _behind_linear
                pairs[module.quantized_name] = find(layer, module, linear, model)
    return pairs


def _behind_norm(
    layer: nn.Module, module: QuantizedLinear, linear: Linear, _: DecoderConfig
) -> SmoothingPair:
    assert linear.norm is not None, "the table says what feeds a linear"
    norm: Any = layer.get_submodule(linear.norm)
    bias = getattr(norm, "bias", None)
    # Megatron's and Transformer Engine's norms say so themselves; others cannot know the setting.
    is_zero_centred = bool(getattr(norm, "zero_centered_gamma", False))
    if module.config.layernorm_zero_centered_gamma and not is_zero_centred:
        raise UserError(
            f"{module.quantized_name}: layernorm_zero_centered_gamma is set, but {linear.norm} is a "
            f"{type(norm).__name__}, which does not add 1 to its weight. Unset it, use a norm that "
            "does, or leave smoothquant off."
        )
    return SmoothingPair(
        module,
        norm.weight.detach(),
        None if bias is None else bias.detach(),
        offset=float(is_zero_centred),
    )


def _behind_linear(
    layer: nn.Module, module: QuantizedLinear, linear: Linear, model: DecoderConfig
) -> SmoothingPair:
    assert linear.fed_by is not None, "as the caller saw"
    name, part = linear.fed_by
    before: Any = layer.get_submodule(name)
    fused = model.linear(name)
    tp_group, start, rows = module.tp_group, 0, []
    for piece in local_pieces(model, fused, tp_group.rank(), tp_group.size()):
        count = piece.rows.stop - piece.rows.start
        if piece.part == part:
            rows.append(torch.arange(start, start + count))
        start += count
    return SmoothingPair(
        module,
        before.weight.detach(),
        None if before.bias is None else before.bias.detach(),
        rows=torch.cat(rows).to(module.weight.device),
        heads_per_group=model.size(linear.columns) // model.size(fused.parts[part].rows),
        head_dim=model.size("head"),
    )

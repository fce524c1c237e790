"""Where the reciprocal of an input's scaling can go, so that the model's function stays.

Dividing what feeds input channel `j` by `s_j` and multiplying column `j` of the weight by `s_j` leaves
the output as it was. The division is folded into the tensor before, so nothing is added when serving.
The table of the model (`models/structure.py`) says which tensor that is:

| `norm` | `fed_by`   | `1 / s_j` goes into                           | `s` is the same for             |
|--------|------------|-----------------------------------------------|---------------------------------|
| given  | -          | norm weight and bias `j`                      | -                               |
| -      | up rows    | row `j` of the up weight, and its bias        | -                               |
| -      | value rows | row of the value head in the qkv weight, bias | query heads with one value head |

Behind the norm of a mixture all experts of the layer share one `s`, on all ranks, as servers have one
norm; the second linear of each expert has its own. The router reads that norm, too: its columns are
multiplied by `s` in its own dtype. With powers of two that is exact, as is the division of the norm, so
that every token goes to the experts it went to, with the same weights to the bit. Other factors round
norm and router once more, and routing with them.

Tensor parallelism: `s` is computed whole, [I], on every rank; a row-parallel linear and the rows before
it take this rank's slice. Attention mixes tokens, not channels of a head, so values can be scaled.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mqat.errors import UserError
from mqat.models.decoder import DecoderConfig
from mqat.models.structure import Linear, in_layer
from mqat.parallel.layout import local_pieces
from mqat.parallel.linear import QuantizedLinear, QuantRowParallelLinear, decoder_linears
from mqat.parallel.quantized_module import unwrapped


@dataclass(frozen=True)
class SmoothingPair:
    """Linears that read one tensor, and what is before it and takes up `1 / s`.

    Attributes:
        linears: By global name; their columns are multiplied by `s`. One, or this rank's experts of a
            layer, in their order.
        before: Weight whose rows are divided in place: of a norm, [I], or of a linear, [O, H].
        before_bias: [I] or [O]; None: there is none.
        rows: Of `before` and its bias, in the order of the input channels, int64; None: all.
        offset: What the norm adds to its weight: 1 where that is zero-centred.
        heads_per_group: Heads of the input that share a head of rows (query heads), otherwise 1.
        head_dim: Channels of a head.
        router: Weight [experts, I] of the router, where that reads the same norm as `linears`, and `s`
            belongs to all experts of the layer; else None.
    """

    linears: Mapping[str, QuantizedLinear]
    before: Tensor
    before_bias: Tensor | None = None
    rows: Tensor | None = None
    offset: float = 0.0
    heads_per_group: int = 1
    head_dim: int = 1
    router: Tensor | None = None

    @property
    def linear(self) -> QuantizedLinear:
        """The first; the others have its layout, shape and dtype."""
        return next(iter(self.linears.values()))

    @property
    def expert_ranks(self) -> Any:
        """Ranks whose experts share `s`; None: it is this pair's alone."""
        groups = self.linear.expert_groups
        return None if self.router is None or groups is None else groups.ep

    def tied(self, per_channel: Tensor) -> Tensor:
        """The largest value among channels that must share a factor, at each of them; [I]."""
        if self.heads_per_group == 1:
            return per_channel
        heads = per_channel.view(-1, self.heads_per_group, self.head_dim)
        return heads.amax(dim=1, keepdim=True).expand_as(heads).reshape(-1)

    def fold_(self, scale: Tensor) -> None:
        """Multiplies the weights' columns by `scale` [I] and divides what is before by it.

        By `scale` in the weights' dtype, on both sides.
        """
        tp_group = self.linear.tp_group
        local = scale
        if isinstance(self.linear, QuantRowParallelLinear):
            local = scale.chunk(tp_group.size())[tp_group.rank()]
        local = local.to(self.linear.weight.dtype)
        for linear in self.linears.values():
            linear.weight.detach().mul_(local)
        if self.router is not None:
            self.router.mul_(local.to(self.router.dtype))
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

    A pair is called as its linear; that of the experts behind a norm, as the norm.

    Raises:
        UserError: The norm before is of an unknown kind; names it.
    """
    modules, pairs = decoder_linears(chunks), dict[str, SmoothingPair]()
    for layer in (layer for chunk in unwrapped(chunks) for layer in chunk.decoder.layers):
        number = layer.layer_number - 1
        experts: dict[str, QuantizedLinear] = {}
        for linear in model.linears_of(number):
            name = in_layer(number, linear.name)
            if name not in modules or name not in names:
                continue
            own = {name: modules[name]}
            if linear.fed_by is not None:
                before = modules[in_layer(number, linear.fed_by[0])]
                pairs[name] = _behind_linear(own, before, linear, model)
            elif linear.expert is None:
                pairs[name] = _behind_norm(layer, own, linear)
            else:
                experts |= own
                assert linear.norm is not None and model.router is not None, "experts have both"
                router = layer.get_submodule(model.router.name).weight.detach()
                pairs[in_layer(number, linear.norm)] = _behind_norm(layer, experts, linear, router)
    return pairs


def _behind_norm(
    layer: nn.Module,
    linears: Mapping[str, QuantizedLinear],
    linear: Linear,
    router: Tensor | None = None,
) -> SmoothingPair:
    assert linear.norm is not None, "the table says what feeds a linear"
    norm: Any = layer.get_submodule(linear.norm)
    bias = getattr(norm, "bias", None)
    name, module = next(iter(linears.items()))
    # Megatron's and Transformer Engine's norms say so themselves; others cannot know the setting.
    is_zero_centred = bool(getattr(norm, "zero_centered_gamma", False))
    if module.config.layernorm_zero_centered_gamma and not is_zero_centred:
        raise UserError(
            f"{name}: layernorm_zero_centered_gamma is set, but {linear.norm} is a "
            f"{type(norm).__name__}, which does not add 1 to its weight. Unset it, use a norm that "
            "does, or leave smoothquant off."
        )
    return SmoothingPair(
        linears,
        norm.weight.detach(),
        None if bias is None else bias.detach(),
        offset=float(is_zero_centred),
        router=router,
    )


def _behind_linear(
    linears: Mapping[str, QuantizedLinear],
    before: Any,
    linear: Linear,
    model: DecoderConfig,
) -> SmoothingPair:
    assert linear.fed_by is not None, "as the caller saw"
    name, part = linear.fed_by
    (module,) = linears.values()
    fused = model.linear(name)
    tp_group, start, rows = module.tp_group, 0, []
    for piece in local_pieces(model, fused, tp_group.rank(), tp_group.size()):
        count = piece.rows.stop - piece.rows.start
        if piece.part == part:
            rows.append(torch.arange(start, start + count))
        start += count
    return SmoothingPair(
        linears,
        before.weight.detach(),
        None if before.bias is None else before.bias.detach(),
        rows=torch.cat(rows).to(module.weight.device),
        heads_per_group=model.size(linear.columns) // model.size(fused.parts[part].rows),
        head_dim=model.size("head"),
    )

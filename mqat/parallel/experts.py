"""Experts of a layer with quantized linears: one after the other, each with scales of its own.

A token's weight for an expert multiplies the expert's output, as servers do it; Megatron's own experts
multiply the input of `linear_fc2`, whose scales would then belong to numbers that no server quantizes.

While calibrating, a layer is computed microbatch by microbatch, so that GEMMs have the same shapes and
sums the same order on every layout; likewise, quantized, where a report follows tokens. Legend: `N`
tokens of a microbatch, `E` experts, `K` of a token, `R` ranks that share experts (EP), `H` hidden.

    hidden         [N/tp, H]       -> [N, H]        gathered under sequence parallelism
    all microbatches of EP ranks      [R, N, H]     all-gather over EP; routing [R, N, E] likewise
    each expert                       [n, H]        the tokens of one microbatch that go to it, in order
    outputs by number of the expert   [R, N, K, H]  sum over expert TP x EP: all but one rank add zero
    own microbatch                    [N, H]        added over K in the order of experts

Shared experts are an MLP like any other, whose linears are exact on every layout; the one row that
weighs their output sees all N tokens of a microbatch.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from mqat.errors import UserError
from mqat.models.structure import FC1, FC2
from mqat.parallel.linear import QuantizedLinear
from mqat.parallel.quantized_module import ExpertGroups
from mqat.parallel.reduce import all_reduce_fused_


class QuantExperts(SequentialMLP):  # type: ignore[misc]
    """This rank's experts; takes the arguments of `SequentialMLP` and the specs of all experts.

    Args:
        num_local_experts: On this rank.
        config: Megatron's.
        submodules: Ignored: every expert has its own.
        pg_collection: Process groups.
        experts: Submodules of each expert of the layer, over all ranks.
        name: Megatron's, since 0.18.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: Any,
        submodules: Any = None,
        pg_collection: Any = None,
        *,
        experts: Sequence[MLPSubmodules],
        name: str | None = None,
    ) -> None:
        super().__init__(0, config, submodules, pg_collection)
        self.num_local_experts = num_local_experts
        groups = ExpertGroups(self.tp_group, self.dp_group, self.ep_group)
        first = self.ep_group.rank() * num_local_experts
        for slots in experts[first : first + num_local_experts]:
            expert = MLP(
                self.config,
                slots,
                is_expert=True,
                ffn_hidden_size=self.config.moe_ffn_hidden_size,
                tp_group=self.tp_group,
            )
            for linear in _linears_of(expert):
                linear.expert_groups = groups
            self.local_experts.append(expert)

    def forward(
        self,
        permuted_local_hidden_states: Tensor,
        tokens_per_expert: Tensor,
        permuted_probs: Tensor,
    ) -> tuple[Tensor, None]:
        """Tokens [n, H] sorted by expert -> their outputs times `permuted_probs` [n].

        An expert without tokens is called, too: its gradients are zero, not missing.
        """
        counts = tokens_per_expert.tolist()
        pairs = zip(
            permuted_local_hidden_states.split(counts), permuted_probs.split(counts), strict=True
        )
        outputs = [
            _weighted(expert, tokens, probs)
            for expert, (tokens, probs) in zip(self.local_experts, pairs, strict=True)
        ]
        return torch.cat(outputs), None


def _weighted(expert: MLP, tokens: Tensor, probs: Tensor) -> Tensor:
    output, _ = expert(tokens[:, None])
    weighted: Tensor = output[:, 0] * probs[:, None].to(output.dtype)
    return weighted


class QuantMoELayer(MoELayer):  # type: ignore[misc]
    """Megatron's, with layout-exact calibration.

    Attributes:
        follows_tokens: Compute as while calibrating, where linears know which of their tokens are real.
    """

    follows_tokens = False

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """As Megatron's, on [S, B, H] or its part under sequence parallelism.

        Raises:
            UserError: Training with tensor but without sequence parallelism.
        """
        if self.follows_tokens or _linears(self.experts)[0].is_calibrating:
            return self._exact(hidden_states), None
        if self.training and self.attn_tp_group.size() > 1 and not self.config.sequence_parallel:
            raise UserError(
                "experts are trained with tensor parallelism only together with sequence parallelism; "
                "set model.sequence_parallel=true."
            )
        output: tuple[Tensor, None] = super().forward(hidden_states, *args, **kwargs)
        return output

    def _exact(self, hidden: Tensor) -> Tensor:
        """In shapes and orders of no layout (table above)."""
        is_cut = self.config.sequence_parallel and self.attn_tp_group.size() > 1
        whole = hidden
        if is_cut:
            whole = gather_from_sequence_parallel_region(hidden, group=self.attn_tp_group)
        probs, routing = self.router(whole)
        linears = _linears(self.experts)
        mask = linears[0].token_mask
        real = torch.ones(len(routing), dtype=torch.bool, device=whole.device)
        if mask is not None:
            real = mask.t().reshape(-1).to(whole.device)
        parts = (whole.reshape(-1, whole.shape[-1]), probs, routing, real)
        rows, probs, routing, real = (_of_all(part, self.ep_group) for part in parts)
        slots = rows.new_zeros(*rows.shape[:2], self.config.moe_router_topk, rows.shape[-1])
        place = routing.long().cumsum(dim=-1) - 1
        try:
            for source in range(len(rows)):
                for number, expert in zip(
                    self.local_expert_indices, self.experts.local_experts, strict=True
                ):
                    taken = routing[source, :, number].nonzero()[:, 0]
                    if not len(taken):
                        continue
                    for linear in _linears_of(expert):
                        linear.token_mask = real[source, taken][None].cpu()
                    output = _weighted(expert, rows[source, taken], probs[source, taken, number])
                    slots[source, taken, place[source, taken, number]] = output
        finally:
            for linear in linears:
                linear.token_mask = mask
        group = self.token_dispatcher.tp_ep_group
        all_reduce_fused_([slots], dist.ReduceOp.SUM, group)
        own = slots[self.ep_group.rank()]
        total = torch.zeros_like(own[:, 0])
        for number in range(own.shape[1]):
            total = total + own[:, number]
        total = total.view(whole.shape)
        weight = self._shared_weight(whole)
        if is_cut:
            total = scatter_to_sequence_parallel_region(total, group=self.attn_tp_group)
        if self.shared_experts is None:
            return total
        if weight is not None and is_cut:
            weight = scatter_to_sequence_parallel_region(weight, group=self.attn_tp_group)
        shared, _ = MLP.forward(self.shared_experts, hidden)  # whose linears are exact themselves
        return total + (shared if weight is None else shared * weight)

    def _shared_weight(self, whole: Tensor) -> Tensor | None:
        """What the shared experts' output is multiplied by, [S, B, 1]; None: nothing."""
        if self.shared_experts is None or self.shared_experts.gate_weight is None:
            return None
        return torch.sigmoid(F.linear(whole, self.shared_experts.gate_weight))


@contextmanager
def following_tokens(chunks: Sequence[Any]) -> Iterator[None]:
    """Inside, experts' linears have a `token_mask` of the tokens that they are given."""
    layers = [m for chunk in chunks for m in chunk.modules() if isinstance(m, QuantMoELayer)]
    for layer in layers:
        layer.follows_tokens = True
    try:
        yield
    finally:
        for layer in layers:
            layer.follows_tokens = False


def _linears(experts: SequentialMLP) -> list[QuantizedLinear]:
    return [linear for expert in experts.local_experts for linear in _linears_of(expert)]


def _linears_of(expert: MLP) -> list[QuantizedLinear]:
    return [getattr(expert, linear.kind) for linear in (FC1, FC2)]


def _of_all(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[N, ...] of each rank -> [R, N, ...]."""
    if group.size() == 1:
        return local[None]
    sent = local.to(torch.uint8) if local.dtype == torch.bool else local
    whole = sent.new_empty(group.size() * len(sent), *sent.shape[1:])
    dist.all_gather_into_tensor(whole, sent.contiguous(), group=group)
    return whole.to(local.dtype).view(group.size(), *local.shape)

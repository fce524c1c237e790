"""The unquantized layer spec: lean norms and SwiGLU, scaled-dot-product attention; any device."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn

from mqat.errors import UserError
from mqat.models.structure import ACTIVATION, CORE_ATTENTION, DENSE_NORMS, EXPERTS, OUTPUT_NORMS
from mqat.models.structure import Norm as NormOfLayer
from mqat.parallel.context import own_chunks, whole_sequence
from mqat.specs.causal import (
    capped_attention,
    document_attention,
    masked_attention,
    seen_keys,
)
from mqat.specs.decoding import LayerCache
from mqat.specs.elementwise import Norm, OutputNorm, Swiglu
from mqat.specs.slots import with_slots
from mqat.specs.window import window_of


class SdpaAttention(nn.Module):
    """Core attention through `torch.nn.functional.scaled_dot_product_attention`.

    Same constructor and `forward` contract as Megatron's `DotProductAttention`, and two things more:
    packed documents without a mask of [s, s] numbers, and context parallelism, where each rank gathers
    the keys and values of all (`parallel/context.py`).

    Attributes:
        cp_group: None: whole sequences.
        window: Tokens that a query looks at, itself included; None: all before it.
        softcap: c, where scores s become c tanh(s / c); of a subclass (`with_softcap`).
        cache: While text is generated, the tokens before (`evaluation/cached.py` sets it).
    """

    softcap: float | None = None
    cache: LayerCache | None = None

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__()
        if cp_comm_type not in (None, "all_gather"):
            raise UserError(
                f"cp_comm_type={cp_comm_type!r}: SdpaAttention gathers keys and values; use "
                "'all_gather', or Transformer Engine's attention."
            )
        if attn_mask_type is not AttnMaskType.causal:
            raise UserError(f"attn_mask_type={attn_mask_type}: SdpaAttention is causal only.")
        if config.softmax_type != "vanilla":
            raise UserError(
                f"softmax_type={config.softmax_type!r}: SdpaAttention's is plain; use 'vanilla'."
            )
        self.config = config
        self.window = window_of(config, layer_number)
        group, size = getattr(pg_collection, "cp", None), config.context_parallel_size
        found = 1 if group is None else group.size()
        if size != found:
            raise UserError(
                f"context_parallel_size={size} in the model's configuration, but the process groups are "
                f"of {found}; give mqat.initialize context_parallel={size}."
            )
        self.cp_group = group if size > 1 else None
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Causal attention.

        Args:
            query: [s, b, heads, d] of this rank; under context parallelism its two chunks.
            key: [s, b, groups, d] of this rank; each group serves heads/groups query heads.
            value: Like `key`.
            attention_mask: None: each row is one document. Integers [b, n]: `packing.document_ends` of
                the whole sequences, best on the CPU, as the host reads them. Bool [b, 1, s, s]: True
                where a query must not look (Megatron's convention; includes the causal part).
            attn_mask_type: Ignored: checked by the constructor.
            attention_bias: Must be None.
            packed_seq_params: Must be None.

        Returns:
            [s, b, heads * d].
        """
        if attention_bias is not None or packed_seq_params is not None:
            raise UserError(
                "SdpaAttention supports neither attention_bias nor packed_seq_params; give packed "
                "documents as attention_mask (mqat.data.packing.document_ends)."
            )
        if self.cache is not None:
            return self._cached(query, key, value)
        chunks = [(0, len(query))]
        if self.cp_group is None:
            # Saved for backward, it alone would keep the whole output of linear_qkv, whose view it is.
            value = value.contiguous()
        else:
            length = len(query) // 2
            chunks = [(n * length, (n + 1) * length) for n in own_chunks(self.cp_group)]
            both = whole_sequence(torch.cat([key, value], dim=-1), self.cp_group)
            key, value = both.split([key.shape[-1], value.shape[-1]], dim=-1)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        options: dict[str, Any] = {"dropout_p": dropout, "scale": self.softmax_scale}
        # Ranks hold other heads, so they need other random numbers; sequence parallelism forks outside.
        needs_fork = dropout > 0.0 and not self.config.sequence_parallel
        with get_cuda_rng_tracker().fork() if needs_fork else nullcontext():
            if attention_mask is not None and attention_mask.dtype == torch.bool:
                context = self._dense(q, k, v, ~attention_mask, **options)
            else:
                options |= {"window": self.window, "softcap": self.softcap}
                ends = None if attention_mask is None else attention_mask.tolist()
                context = document_attention(q, k, v, chunks=chunks, ends=ends, **options)
        return context.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)

    def _cached(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Of the next tokens, padded on the right; whole sequences, no gradients."""
        assert self.cache is not None and self.cp_group is None and not self.training
        context = self.cache.attend(
            query.permute(1, 2, 0, 3), key, value, window=self.window, softcap=self.softcap,
            scale=self.softmax_scale, dropout_p=0.0,
        )  # fmt: skip
        return context.permute(2, 0, 1, 3).reshape(*query.shape[:2], -1)

    def _dense(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, **options: Any) -> Tensor:
        """Under a mask [b, 1, s, s] of what may be looked at, as far as the window allows."""
        if self.cp_group is not None:
            raise UserError(
                f"attention_mask: a mask of {tuple(seen.shape)} with context_parallel_size="
                f"{self.cp_group.size()}; give None, or the ends of packed documents "
                "(mqat.data.packing.document_ends)."
            )
        if self.window is not None:
            seen = seen & seen_keys(q.shape[2], k.shape[2], self.window, q.device)
        if self.softcap is not None:
            return capped_attention(q, k, v, seen, softcap=self.softcap, **options)
        return masked_attention(q, k, v, attn_mask=seen, **options)


def with_softcap(attention: type[SdpaAttention], cap: float) -> type[SdpaAttention]:
    """An attention whose scores s become cap tanh(s / cap)."""
    return type(attention.__name__, (attention,), {"softcap": cap})


def gpt_layer_spec(
    norms: Sequence[NormOfLayer] = DENSE_NORMS,
    attention: type[nn.Module] = SdpaAttention,
    *,
    num_experts: int = 0,
    config: Any = None,
) -> ModuleSpec:
    """Megatron's local GPT layer spec with `Norm`, a core attention and `Swiglu`.

    Megatron calls `Swiglu` where its config says `use_te_activation_func`, and its own otherwise.

    Args:
        norms: Of a layer.
        attention: The core attention.
        num_experts: Of a mixture in the place of the MLP, one after the other (`SequentialMLP`).
        config: Megatron's, which norms of what attention and MLP add (`OUTPUT_NORMS`) need.
    """
    inner = [norm for norm in norms if norm not in OUTPUT_NORMS]
    slots: dict[str, Any] = {norm.name: Norm for norm in inner}
    activation = f"{EXPERTS}.activation_func" if num_experts else ACTIVATION
    slots |= {CORE_ATTENTION.name: attention, activation: Swiglu}
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", num_experts=num_experts or None)
    spec = with_slots(spec, slots)
    outer = [norm for norm in norms if norm in OUTPUT_NORMS]
    if not outer:
        return spec
    if config is None:
        raise UserError(
            f"gpt_layer_spec: {outer[0].name} needs Megatron's configuration; give config=, too."
        )
    keys = dict(spec.submodules.sharded_state_dict_keys_map)
    for norm in outer:
        keys[f"{norm.name}."] = norm.stem
        slot = norm.name.partition(".")[0]
        spec = with_slots(spec, {slot: ModuleSpec(OutputNorm, params={"config": config})})
    return replace(spec, submodules=replace(spec.submodules, sharded_state_dict_keys_map=keys))

"""The unquantized layer spec: lean norms and SwiGLU, scaled-dot-product attention; any device."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from mqat.errors import UserError
from mqat.models.structure import CORE_ATTENTION, DENSE_NORMS
from mqat.models.structure import Norm as NormOfLayer
from mqat.specs.elementwise import Norm, Swiglu
from mqat.specs.slots import with_slots


def _grouped_attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """`F.scaled_dot_product_attention` in a fused kernel, also where none takes fewer heads of keys.

    On CUDA flash attention takes no mask, and memory-efficient attention no groups: of packed documents
    torch would keep the scores, [b, heads, s, s] float32, for backward. Repeated keys and values,
    [b, heads, s, d], are linear in s, and that path repeats them too.

    Args:
        q: [b, heads, s, d].
        k: [b, groups, s, d].
        v: Like `k`.
        options: Of torch's function.
    """
    repeats = q.shape[1] // k.shape[1]
    is_grouped = repeats > 1
    if is_grouped:
        choice = torch._fused_sdp_choice(q, k, v, **options, enable_gqa=True)
        if choice == SDPBackend.MATH.value:
            k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
            is_grouped = False
    return F.scaled_dot_product_attention(q, k, v, **options, enable_gqa=is_grouped)


class SdpaAttention(nn.Module):
    """Core attention through `torch.nn.functional.scaled_dot_product_attention`.

    Same constructor and `forward` contract as Megatron's `DotProductAttention`.
    """

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
        if config.context_parallel_size != 1:
            raise UserError("context_parallel_size > 1 is not supported by SdpaAttention.")
        if attn_mask_type is not AttnMaskType.causal:
            raise UserError(f"attn_mask_type={attn_mask_type}: SdpaAttention is causal only.")
        if config.window_size is not None or config.softmax_type != "vanilla":
            raise UserError(
                f"window_size={config.window_size}, softmax_type={config.softmax_type!r}: SdpaAttention "
                "attends to all earlier tokens with a plain softmax; use None and 'vanilla'."
            )
        self.config = config
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
            query: [s, b, heads, d] of this rank.
            key: [s, b, groups, d] of this rank; each group serves heads/groups query heads.
            value: Like `key`.
            attention_mask: None for plain causal attention, else bool [b, 1, s, s], True where a
                query must not look (Megatron's convention; includes the causal part).
            attn_mask_type: Ignored: checked by the constructor.
            attention_bias: Must be None.
            packed_seq_params: Must be None.

        Returns:
            [s, b, heads * d].
        """
        if attention_bias is not None or packed_seq_params is not None:
            raise UserError("SdpaAttention supports neither attention_bias nor packed_seq_params.")
        # Saved for backward, `value` alone would keep the whole output of linear_qkv, whose view it is.
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value.contiguous()))
        dropout = self.dropout if self.training else 0.0
        # Ranks hold other heads, so they need other random numbers; sequence parallelism forks outside.
        needs_fork = dropout > 0.0 and not self.config.sequence_parallel
        with get_cuda_rng_tracker().fork() if needs_fork else nullcontext():
            context = _grouped_attention(
                q,
                k,
                v,
                attn_mask=None if attention_mask is None else ~attention_mask,
                dropout_p=dropout,
                is_causal=attention_mask is None,
                scale=self.softmax_scale,
            )
        return context.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)


def gpt_layer_spec(
    norms: Sequence[NormOfLayer] = DENSE_NORMS, attention: type[nn.Module] = SdpaAttention
) -> ModuleSpec:
    """Megatron's local GPT layer spec with `Norm`, a core attention and `Swiglu`.

    Megatron calls `Swiglu` where its config says `use_te_activation_func`, and its own otherwise.
    """
    slots: dict[str, Any] = {norm.name: Norm for norm in norms}
    slots |= {CORE_ATTENTION.name: attention, "mlp.activation_func": Swiglu}
    return with_slots(get_gpt_layer_local_spec(normalization="RMSNorm"), slots)

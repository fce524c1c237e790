"""Packed documents for core attentions that take Megatron's `PackedSeqParams`: Transformer Engine's."""

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from mqat.errors import UserError
from mqat.transfer import to_device


def packed_seq_params(ends: Tensor, device: torch.device) -> PackedSeqParams:
    """Of the rows of `packing.document_ends`, one after the other; nothing waits for the device.

    Args:
        ends: int32 [b, n + 1] on the CPU.
        device: Of queries, keys and values [b * s, heads, d].
    """
    length = ends[0, -1]
    rows = torch.arange(len(ends), dtype=ends.dtype)[:, None]
    ends = (ends + rows * length).flatten().unique_consecutive()
    longest, places = int(ends.diff().max()), to_device(ends, device)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=places,
        cu_seqlens_kv=places,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def with_document_ends(attention: type) -> type:
    """A core attention that also takes `packing.document_ends` in the place of a mask.

    Positions may go on from document to document: rotary embeddings only see differences. A subclass, so
    that checkpoints keep their names.

    Args:
        attention: Such as Megatron's `TEDotProductAttention`, whose forward pass this hands on to.
    """

    class DocumentAttention(attention):  # type: ignore[misc, valid-type]
        def forward(
            self,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Tensor | None,
            *args: Any,
            **kwargs: Any,
        ) -> Tensor:
            """As `SdpaAttention.forward`: [s, b, heads, d] -> [s, b, heads * d].

            But Transformer Engine looks at no bool mask where its attention is causal.
            """
            if attention_mask is None or attention_mask.dtype == torch.bool:
                plain: Tensor = super().forward(query, key, value, attention_mask, *args, **kwargs)
                return plain
            if self.config.context_parallel_size > 1:
                raise UserError(
                    f"packed documents with context_parallel_size={self.config.context_parallel_size}: "
                    f"{attention.__name__} would cut each document by itself. Use torch's attention "
                    "(mqat.specs.backend.SdpaAttention), or context_parallel_size=1."
                )
            length, batch = query.shape[:2]
            packed = (x.transpose(0, 1).flatten(0, 1) for x in (query, key, value))
            kwargs["packed_seq_params"] = packed_seq_params(attention_mask.cpu(), query.device)
            output: Tensor = super().forward(*packed, None, *args, **kwargs)
            return output.reshape(batch, length, -1).transpose(0, 1)

    return DocumentAttention

"""What Transformer Engine's attention is handed for packed documents, with a stand-in for it."""

import pytest
import torch
from torch import nn

from mqat.data.packing import document_ends
from mqat.errors import UserError
from mqat.specs.causal import trailing_attention
from mqat.specs.packed import packed_seq_params, with_document_ends

SEGMENTS = torch.tensor([[0] * 5 + [1] * 3 + [-1] * 4, [0] * 12])


class Attention(nn.Module):
    """Takes what Megatron's `TEDotProductAttention` takes: thd with `PackedSeqParams`, or sbhd."""

    def __init__(self, context_parallel_size=1):
        super().__init__()
        self.config = type("Config", (), {"context_parallel_size": context_parallel_size})

    def forward(
        self, query, key, value, attention_mask, attn_mask_type=None, packed_seq_params=None
    ):
        assert attention_mask is None
        if packed_seq_params is None:
            parts = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            y = trailing_attention(*parts, dropout_p=0.0, scale=0.25)
            return y.permute(2, 0, 1, 3).flatten(2)
        assert packed_seq_params.qkv_format == "thd"
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        assert max(lengths) == packed_seq_params.max_seqlen_q
        rows = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
        parts = [[x.transpose(0, 1)[None] for x in row] for row in rows]
        y = [
            trailing_attention(*part, dropout_p=0.0, scale=0.25)[0].transpose(0, 1)
            for part in parts
        ]
        return torch.cat(y).flatten(1)


def test_ends_of_rows_become_one_line_of_ends():
    packed = packed_seq_params(document_ends(SEGMENTS), torch.device("cpu"))
    assert packed.cu_seqlens_q.tolist() == packed.cu_seqlens_kv.tolist() == [0, 5, 8, 12, 24]
    assert packed.cu_seqlens_q.dtype == torch.int32
    assert packed.max_seqlen_q == packed.max_seqlen_kv == 12


def test_documents_are_handed_on_packed_and_come_back_in_order():
    q, k, v = torch.randn(3, 12, 2, 4, 16, generator=torch.Generator().manual_seed(0))
    attention = with_document_ends(Attention)()
    found = attention(q, k, v, document_ends(SEGMENTS))
    assert found.shape == (12, 2, 64)
    alone = [
        attention(q[a:b, :1], k[a:b, :1], v[a:b, :1], None) for a, b in ((0, 5), (5, 8), (8, 12))
    ]
    torch.testing.assert_close(found[:, :1], torch.cat(alone))
    torch.testing.assert_close(found[:, 1:], attention(q, k, v, None)[:, 1:])
    assert not torch.allclose(found[:, 0], attention(q, k, v, None)[:, 0])  # control


def test_documents_cut_over_context_ranks_are_refused():
    x = torch.zeros(12, 2, 4, 16)
    with pytest.raises(
        UserError, match="documents with context_parallel_size=2: Attention would cut"
    ):
        with_document_ends(Attention)(2)(x, x, x, document_ends(SEGMENTS))

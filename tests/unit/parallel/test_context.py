"""Which tokens a context-parallel rank holds, and what is refused."""

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import get_pos_emb_on_this_cp_rank
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType

from mqat.config import ModelConfig
from mqat.errors import UserError
from mqat.parallel.context import own_chunks, own_tokens
from mqat.runtime import cpu
from mqat.specs.backend import SdpaAttention, gpt_layer_spec
from mqat.specs.gpt import quantize_block_spec, with_slots
from mqat.specs.model import transformer_config
from tests.unit.model_fixtures import MODEL


class Group:
    """What is asked of a process group here."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_hold_the_chunks_that_megatron_gives_them(size):
    cpu.install()
    tokens = torch.arange(32).view(2, 16)
    for rank in range(size):
        group = Group(rank, size)
        expected = get_pos_emb_on_this_cp_rank(tokens, 1, group)
        assert torch.equal(own_tokens(tokens, group), expected)
        chunks = tokens.view(2, 2 * size, -1)[:, list(own_chunks(group))].flatten(1)
        assert torch.equal(chunks, expected)
    assert not torch.equal(own_tokens(tokens, Group(0, size)), tokens.chunk(size, 1)[0])  # control


def test_sequences_that_cannot_be_cut_are_refused_with_a_length_that_can():
    with pytest.raises(UserError, match=r"18 tokens .* multiple of 4, such as 20"):
        own_tokens(torch.zeros(2, 18), Group(0, 2))


def config():
    return transformer_config(MODEL, ModelConfig(context_parallel_size=2), torch.float32)


def test_a_core_attention_that_knows_only_whole_sequences_is_refused():
    spec = with_slots(gpt_layer_spec(), {"self_attention.core_attention": DotProductAttention})
    with pytest.raises(UserError, match=r"DotProductAttention.* context_parallel_size=2"):
        quantize_block_spec(spec, {}, model=MODEL, transformer_config=config(), pp_rank=0)


def test_another_way_to_communicate_is_refused():
    with pytest.raises(UserError, match=r"cp_comm_type='p2p'.*use 'all_gather'"):
        SdpaAttention(config(), 1, AttnMaskType.causal, "self", cp_comm_type="p2p")


@pytest.mark.parametrize("cp", [None, Group(0, 4)])
def test_groups_of_another_size_are_refused(cp):
    class Groups:
        pass

    Groups.cp = cp
    with pytest.raises(UserError, match=r"context_parallel_size=2 .* groups are of [14]; give"):
        SdpaAttention(config(), 1, AttnMaskType.causal, "self", pg_collection=Groups)


def test_a_dense_mask_is_refused_under_context_parallelism():
    class Groups:
        cp = Group(0, 2)

    attention = SdpaAttention(config(), 1, AttnMaskType.causal, "self", pg_collection=Groups)
    with pytest.raises(UserError, match=r"attention_mask: a mask of \(1, 1, 8, 8\).*=2"):
        attention._dense(*[torch.zeros(1, 1, 8, 8)] * 3, torch.zeros(1, 1, 8, 8, dtype=torch.bool))

from dataclasses import replace

import pytest
import torch

from mqat.export.reshard import InferenceRank, linear_columns, linear_rows, owned, table_rows
from mqat.models.structure import FC1, PROJ, QKV
from tests.unit.export.checkpoints import TINY

# Three query heads a group, heads of two rows: small enough to write the order down.
SMALL = replace(TINY, num_attention_heads=6, num_query_groups=2, head_dim=2, intermediate_size=4)


def tp_ranks(tp):
    return [InferenceRank(rank, tp, 0, 1) for rank in range(tp)]


def rows(spans):
    return [row for span in spans for row in range(span.start, span.stop)]


def qkv_rows(model, rank):
    return linear_rows(model, QKV, [0, 1, 2], rank)


def test_qkv_rows_by_hand():
    # Checkpoint rows: group 0 = q 0..5, k 6..7, v 8..9; group 1 = q 10..15, k 16..17, v 18..19.
    q = [*range(6), *range(10, 16)]
    assert rows(qkv_rows(SMALL, *tp_ranks(1))) == [*q, 6, 7, 16, 17, 8, 9, 18, 19]
    first, second = tp_ranks(2)
    assert rows(qkv_rows(SMALL, first)) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert rows(qkv_rows(SMALL, second)) == [10, 11, 12, 13, 14, 15, 16, 17, 18, 19]


def test_more_ranks_than_key_value_heads_copy_each_head_to_consecutive_ranks():
    model = replace(SMALL, num_attention_heads=4)
    heads = [owned(model, "key_value", rank) for rank in tp_ranks(4)]
    assert heads == [slice(0, 2), slice(0, 2), slice(2, 4), slice(2, 4)]  # of two rows each
    # group 0 = q 0..3, k 4..5, v 6..7; group 1 = q 8..11, k 12..13, v 14..15
    assert [rows(qkv_rows(model, rank)) for rank in tp_ranks(4)] == [
        [0, 1, 4, 5, 6, 7],
        [2, 3, 4, 5, 6, 7],
        [8, 9, 12, 13, 14, 15],
        [10, 11, 12, 13, 14, 15],
    ]


@pytest.mark.parametrize("tp", [1, 2])
def test_the_ranks_together_hold_every_qkv_row_once(tp):
    held = [row for rank in tp_ranks(tp) for row in rows(qkv_rows(SMALL, rank))]
    assert sorted(held) == list(range(SMALL.linear_shape(QKV.name)[0]))


def test_gate_and_up_are_cut_apart_not_as_one_fused_matrix():
    gate, up = ([rows(linear_rows(SMALL, FC1, [part], r)) for r in tp_ranks(2)] for part in (0, 1))
    assert gate == [[0, 1], [2, 3]]
    assert up == [[4, 5], [6, 7]]
    naive = [list(half) for half in torch.arange(8).chunk(2)]
    assert gate[1] != naive[1]  # control: chunking is another cut


def test_vocabulary_rows_are_padded_at_the_end_only():
    model = replace(SMALL, vocab_size=10)
    parts = [table_rows(model.vocab_size, rank) for rank in tp_ranks(4)]
    assert parts == [(slice(0, 3), 0), (slice(3, 6), 0), (slice(6, 9), 0), (slice(9, 10), 2)]
    short = [table_rows(5, rank) for rank in tp_ranks(4)]
    assert short[3] == (slice(5, 5), 2)  # a rank of padding alone


def test_stages_take_consecutive_layers_and_only_the_ends_have_tables():
    ranks = [InferenceRank(0, 1, stage, 2) for stage in range(2)]
    assert [list(rank.layers(TINY)) for rank in ranks] == [[0, 1], [2, 3]]
    assert [(rank.is_first_stage, rank.is_last_stage) for rank in ranks] == [
        (True, False),
        (False, True),
    ]


def test_row_parallel_weights_are_cut_by_columns_and_hold_every_row():
    ranks = tp_ranks(2)
    assert [linear_columns(SMALL, PROJ, rank) for rank in ranks] == [slice(0, 6), slice(6, 12)]
    assert all(linear_rows(SMALL, PROJ, [0], r) == [slice(0, SMALL.hidden_size)] for r in ranks)
    assert linear_columns(SMALL, FC1, ranks[1]) == slice(0, SMALL.hidden_size)

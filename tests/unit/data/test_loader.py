from __future__ import annotations

from typing import Any

import pytest
import torch

from mqat.data.loader import Batches, Microbatch
from mqat.data.packing import PackedDataset


def dataset(rows: int, length: int = 4, segments: torch.Tensor | None = None) -> PackedDataset:
    tokens = torch.arange(rows, dtype=torch.int32)[:, None] * 100 + torch.arange(
        length + 1, dtype=torch.int32
    )
    return PackedDataset(tokens, torch.ones(rows, length, dtype=torch.bool), segments)


def batches(data: PackedDataset, **changes: Any) -> Batches:
    settings: dict[str, Any] = {
        "global_batch_size": 8, "micro_batch_size": 2, "dp_rank": 0, "dp_size": 1,
        "shuffle": True, "seed": 3,
    }  # fmt: skip
    return Batches(data, **settings | changes)


def row_numbers(microbatches: list[Microbatch]) -> list[list[int]]:
    found = []
    for microbatch in microbatches:
        tokens = microbatch["tokens"]
        assert tokens is not None
        found.append((tokens[:, 0] // 100).tolist())
    return found


@pytest.mark.parametrize("dp_size", [2, 4])
def test_the_same_microbatches_exist_at_every_data_parallel_size(dp_size: int) -> None:
    data = dataset(20)
    alone = row_numbers(batches(data).microbatches(8))
    ranks = [
        row_numbers(batches(data, dp_rank=r, dp_size=dp_size).microbatches(8))
        for r in range(dp_size)
    ]
    assert [m for together in zip(*ranks, strict=True) for m in together] == alone
    # Control: another seed gives other microbatches.
    assert row_numbers(batches(data, seed=4).microbatches(8)) != alone


def test_every_epoch_has_every_sample_once_in_a_new_order() -> None:
    source = batches(dataset(20))
    rows = [r for step in range(5) for m in row_numbers(source.microbatches(8 * step)) for r in m]
    first, second = rows[:20], rows[20:]
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second


def test_the_position_alone_decides_so_resuming_at_another_batch_size_goes_on_exactly() -> None:
    data = dataset(20)
    straight = batches(data)
    rows = [r for s in (0, 8, 16) for m in row_numbers(straight.microbatches(s)) for r in m]
    resumed = batches(data, global_batch_size=4)
    resumed_rows = [
        r for s in (12, 16, 20) for m in row_numbers(resumed.microbatches(s)) for r in m
    ]
    assert resumed_rows == rows[12:]


def test_a_batch_has_the_shapes_and_types_of_a_megatron_forward() -> None:
    (batch,) = batches(dataset(3), global_batch_size=3, micro_batch_size=3).microbatches(0)
    tokens, labels, mask, positions = (
        batch[key] for key in ("tokens", "labels", "loss_mask", "position_ids")
    )
    assert tokens is not None and labels is not None and mask is not None and positions is not None
    assert tokens.dtype == labels.dtype == positions.dtype == torch.int64
    assert mask.dtype == torch.float32
    assert torch.equal(tokens[:, 1:], labels[:, :-1])
    assert torch.equal(positions, torch.arange(4).expand(3, 4))
    assert batch["attention_mask"] is None


def test_attention_is_told_where_conversations_and_padding_end() -> None:
    segments = torch.tensor([[0, 0, 1, -1], [0, 0, 0, 0]], dtype=torch.int32)
    data = dataset(2, segments=segments)
    (batch,) = batches(data, global_batch_size=2, shuffle=False).microbatches(0)
    ends = batch["attention_mask"]
    assert ends is not None and ends.dtype == torch.int32
    assert ends.tolist() == [[0, 2, 3, 4], [0, 4, 4, 4]]


def test_padding_and_filler_are_not_real_tokens_but_prompts_are() -> None:
    segments = torch.tensor([[0, 0, 1, -1], [0, 0, 0, 0], [0, -1, -1, -1]], dtype=torch.int32)
    data = dataset(3, segments=segments)
    data.loss_mask[:, 0] = False  # a prompt
    first, last = batches(data, global_batch_size=4).epoch()[0]
    assert first["token_mask"] is not None and first["token_mask"].dtype == torch.bool
    assert first["token_mask"].tolist() == [[True, True, True, False], [True] * 4]
    assert last["token_mask"] is not None
    assert last["token_mask"].tolist() == [[True, False, False, False], [False] * 4]  # a filler


def test_a_text_has_filler_but_no_padding() -> None:
    first, last = batches(dataset(3), global_batch_size=4).epoch()[0]
    assert first["token_mask"] is None  # all are real
    assert last["token_mask"] is not None
    assert last["token_mask"].tolist() == [[True] * 4, [False] * 4]
    assert all(m["token_mask"] is None for m in batches(dataset(3)).microbatches(0))


def test_an_evaluation_epoch_counts_every_sample_once_at_every_layout() -> None:
    data = dataset(11)
    for dp_size in (1, 2, 4):
        counted: dict[int, float] = {}
        lengths = set()
        for rank in range(dp_size):
            for step in batches(data, dp_rank=rank, dp_size=dp_size, shuffle=False).epoch():
                lengths.add(len(step))
                for numbers, microbatch in zip(row_numbers(step), step, strict=True):
                    mask = microbatch["loss_mask"]
                    assert mask is not None
                    for number, weight in zip(numbers, mask[:, 0].tolist(), strict=True):
                        counted[number] = counted.get(number, 0.0) + weight
        assert counted == dict.fromkeys(range(11), 1.0)
        assert len(lengths) == 1  # every rank runs as many microbatches


def test_the_first_samples_come_in_file_order_whatever_the_shuffle() -> None:
    (step,) = batches(dataset(20)).first(4)
    assert row_numbers(step) == [[0, 1], [2, 3]]
    assert row_numbers(batches(dataset(3)).first(4)[0]) == [[0, 1], [2, 0]]
    assert batches(dataset(20), dp_rank=3, dp_size=4).first(4) == [[]]

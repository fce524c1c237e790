from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mqat.config import DataConfig
from mqat.data.dataset import load_dataset, load_run_data
from mqat.data.tokenizer import save_tokenizer
from mqat.models.decoder import DecoderConfig

PAIR = {"input": "What is a class?", "output": "A template for objects."}


def model(vocab_size: int) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=128, num_layers=2,
        num_attention_heads=4, num_query_groups=2, head_dim=16,
    )  # fmt: skip


def write_lines(path: Path, *records: object) -> str:
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return str(path)


def test_files_become_sequences_with_counts_of_what_was_left_out(
    tokenizer: Any, tmp_path: Path
) -> None:
    long = {"input": "q", "output": "word " * 200}
    file = write_lines(tmp_path / "a.jsonl", PAIR, {"output": "x"}, long, PAIR)
    packed = load_dataset(
        [file], format="sft", tokenizer=tokenizer, seq_length=48, bad_lines="skip"
    )
    assert packed.stats.documents == 3
    (skipped,) = packed.stats.skipped_lines
    assert skipped.startswith(f"{file}:2: expected 'messages', 'conversations', 'input' and")
    assert packed.stats.cut_conversations == 1
    assert packed.stats.dropped_tokens == packed.dropped_tokens > 0
    with pytest.raises(ValueError, match=r"a\.jsonl:2: expected"):
        load_dataset([file], format="sft", tokenizer=tokenizer, seq_length=48)


def test_an_unknown_format_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="format='chat': must be 'text' or 'sft'"):
        load_dataset([tmp_path], format="chat", tokenizer=tokenizer, seq_length=8)


@pytest.mark.parametrize("format", ["text", "sft"])
def test_a_model_from_nothing_gets_a_tokenizer_of_its_training_text(
    tmp_path: Path, format: str
) -> None:
    records = {
        "text": {"text": "quokka " * 50},
        "sft": {"input": "quokka", "output": "quokka"},
    }
    file = write_lines(tmp_path / "a.jsonl", *[records[format]] * 4)
    settings = DataConfig(train=[file], validation=[file], format=format, seq_length=48)
    data = load_run_data(settings, model=model(300), source=None, checkpoint=None)
    assert len(data.tokenizer(" quokka")["input_ids"]) <= 2  # learned, not spelled in bytes
    assert len(data.tokenizer) <= 300
    assert "data: 8 documents" in data.description


def test_packaged_text_needs_no_files_and_is_the_same_every_time() -> None:
    settings = DataConfig(packaged="python_docs", seq_length=64)
    first, second = (
        load_run_data(settings, model=model(512), source=None, checkpoint=None) for _ in range(2)
    )
    assert torch.equal(first.train.tokens, second.train.tokens)
    assert len(first.validation) > 50


def test_data_without_files_or_with_a_foreign_tokenizer_are_refused(
    tokenizer: Any, tmp_path: Path
) -> None:
    file = write_lines(tmp_path / "a.jsonl", PAIR)
    only_train = DataConfig(train=[file], format="sft")
    with pytest.raises(ValueError, match=r"train and model\.data\.validation must each name"):
        load_run_data(only_train, model=model(600), source=None, checkpoint=None)
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    both = DataConfig(train=[file], validation=[file], format="sft")
    with pytest.raises(ValueError, match="tokenizer has 600 entries, the model's vocabulary 300"):
        load_run_data(both, model=model(300), source=None, checkpoint=tmp_path)

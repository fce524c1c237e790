"""The data of a run: tokenizer, packed training and validation sequences, and what was left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mqat.config import DataConfig
from mqat.data.documents import ReadStats, read_conversations, read_texts
from mqat.data.packaged import hold_out, python_docs_documents, wikipedia_documents
from mqat.data.packing import PackedDataset, pack_conversations, pack_text
from mqat.data.tokenizer import load_tokenizer, train_small_tokenizer
from mqat.models.llama import LlamaConfig


@dataclass(frozen=True)
class RunData:
    """Tokenizer and sequences of a run; `description` is one line for people."""

    tokenizer: Any
    train: PackedDataset
    validation: PackedDataset
    description: str


def load_files(
    paths: Sequence[str], settings: DataConfig, tokenizer: Any, stats: ReadStats
) -> PackedDataset:
    """Reads and packs files in the configured format.

    Raises:
        ValueError: As `read_texts` and `pack_text`; names file and line.
    """
    files = [Path(path) for path in paths]
    if settings.format == "sft":
        conversations = read_conversations(files, settings.bad_lines, stats)
        return pack_conversations(conversations, tokenizer, settings.seq_length)
    documents = read_texts(files, settings.bad_lines, stats)
    return pack_text(documents, tokenizer, settings.seq_length)


def _tokenizer(
    source: Path | None, checkpoint: Path | None, train: list[str], model: LlamaConfig
) -> Any:
    if checkpoint is not None:
        tokenizer = load_tokenizer(checkpoint / "tokenizer")
    elif source is not None:
        tokenizer = load_tokenizer(source)
    else:
        tokenizer = train_small_tokenizer(train, model.vocab_size)
    if len(tokenizer) > model.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} entries, the model's vocabulary {model.vocab_size}; "
            "they do not belong together."
        )
    return tokenizer


def load_run_data(
    settings: DataConfig, *, model: LlamaConfig, source: Path | None, checkpoint: Path | None
) -> RunData:
    """Tokenizes and packs everything a run reads; identical on every rank.

    Args:
        settings: `model.data` of the configuration.
        model: Its vocabulary must hold the tokenizer's.
        source: Where the pretrained model's tokenizer is; None with random weights.
        checkpoint: mqat checkpoint that is restored, if any.

    Raises:
        ValueError: No data, unreadable data, or a tokenizer that does not fit the model.
    """
    stats = ReadStats()
    if settings.packaged is not None:
        named = {"wikipedia": wikipedia_documents, "python_docs": python_docs_documents}
        train_documents, held_out = hold_out(named[settings.packaged]())
        tokenizer = _tokenizer(source, checkpoint, train_documents, model)
        train = pack_text(train_documents, tokenizer, settings.seq_length)
        validation = pack_text(held_out, tokenizer, settings.seq_length)
        stats.documents = len(train_documents) + len(held_out)
    else:
        if not settings.train or not settings.validation:
            raise ValueError(
                "config: model.data.train and model.data.validation must each name at least one "
                "file (hold out whole documents), or set model.data.packaged."
            )
        texts = (
            read_texts([Path(p) for p in settings.train], settings.bad_lines, ReadStats())
            if source is None and checkpoint is None and settings.format == "text"
            else []
        )
        tokenizer = _tokenizer(source, checkpoint, texts, model)
        train = load_files(settings.train, settings, tokenizer, stats)
        validation = load_files(settings.validation, settings, tokenizer, stats)
    dropped = train.dropped_tokens + validation.dropped_tokens
    description = (
        f"data: {stats.documents} documents, {len(train)} training and {len(validation)} "
        f"validation sequences of {settings.seq_length} tokens ({dropped} tokens dropped"
        + (f", {len(stats.skipped_lines)} bad lines skipped)" if stats.skipped_lines else ")")
    )
    return RunData(tokenizer, train, validation, description)

"""The data of a run: tokenizer, packed training and validation sequences, and what was left out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mqat.config import DataConfig
from mqat.data.documents import ReadStats, read_conversations, read_texts
from mqat.data.packaged import (
    counting_documents,
    hold_out,
    python_docs_documents,
    wikipedia_documents,
)
from mqat.data.packing import PackedDataset, pack_conversations, pack_text
from mqat.data.sources import resolve
from mqat.data.tokenizer import check_fits, load_tokenizer, train_small_tokenizer
from mqat.errors import UserError
from mqat.models.decoder import DecoderConfig


@dataclass(frozen=True)
class RunData:
    """Tokenizer and sequences of a run; `description` is one line for people."""

    tokenizer: Any
    train: PackedDataset
    validation: PackedDataset
    description: str


def load_dataset(
    paths: Sequence[str | Path],
    *,
    format: str,
    tokenizer: Any,
    seq_length: int,
    bad_lines: str = "error",
    columns: Sequence[str] = (),
    key: str = "paths",
) -> PackedDataset:
    """Reads files, tokenizes and packs them.

    Args:
        paths: Files, patterns, data sets; see `sources.resolve`, `read_texts`, `read_conversations`.
        format: `text` or `sft`.
        tokenizer: Transformers tokenizer.
        seq_length: Tokens per sequence.
        bad_lines: `error`, or `skip`: leave out and count.
        columns: Keys of a record that are read; empty: all.
        key: What complaints call `paths`.

    Returns:
        The sequences; `.stats` says how much was read and what was left out.

    Raises:
        ValueError: Unreadable, empty, or a bad line; names file and line.
    """
    if format not in ("text", "sft"):
        raise UserError(f"model.data.format={format!r}: must be 'text' or 'sft'.")
    sources = resolve(paths, key)
    stats = ReadStats()
    if format == "sft":
        conversations = read_conversations(sources, bad_lines, stats, columns)
        return pack_conversations(
            conversations, tokenizer, seq_length, bad_lines=bad_lines, stats=stats
        )
    texts = read_texts(sources, bad_lines, stats, columns)
    return pack_text(texts, tokenizer, seq_length, stats)


def _tokenizer(
    source: Path | None, checkpoint: Path | None, train: Sequence[str], model: DecoderConfig
) -> Any:
    if checkpoint is not None:
        tokenizer = load_tokenizer(checkpoint / "tokenizer")
    elif source is not None:
        tokenizer = load_tokenizer(source)
    else:
        tokenizer = train_small_tokenizer(train, model.vocab_size)
    check_fits(tokenizer, model.vocab_size)
    return tokenizer


def _training_texts(settings: DataConfig) -> list[str]:
    """What a tokenizer is trained on where the model brings none."""
    sources = resolve(settings.train, "model.data.train")
    how = (settings.bad_lines, ReadStats(), settings.columns)
    if settings.format == "text":
        return read_texts(sources, *how)
    conversations = read_conversations(sources, *how)
    return [message["content"] for c in conversations for message in c.messages]


def _describe(train: PackedDataset, validation: PackedDataset, seq_length: int) -> str:
    both = (train.stats, validation.stats)
    left_out = {
        "tokens dropped": sum(s.dropped_tokens for s in both),
        "bad lines skipped": sum(len(s.skipped_lines) for s in both),
        "conversations cut": sum(s.cut_conversations for s in both),
        "conversations dropped, whose answers begin later; raise model.data.seq_length": sum(
            s.dropped_conversations for s in both
        ),
    }
    counts = ", ".join(f"{n} {what}" for what, n in left_out.items() if n) or "nothing left out"
    forms = both[0].forms + both[1].forms
    layouts = ", ".join(f"{count} {form}" for form, count in forms.items())
    documents = f"{sum(s.documents for s in both)} documents{f' ({layouts})' if layouts else ''}"
    return (
        f"data: {documents}, {len(train)} training and "
        f"{len(validation)} validation sequences of {seq_length} tokens ({counts})"
    )


def load_run_data(
    settings: DataConfig, *, model: DecoderConfig, source: Path | None, checkpoint: Path | None
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
    length = settings.seq_length
    if settings.packaged is not None:
        named = {
            "counting": counting_documents,
            "python_docs": python_docs_documents,
            "wikipedia": wikipedia_documents,
        }
        train_documents, held_out = hold_out(named[settings.packaged]())
        tokenizer = _tokenizer(source, checkpoint, train_documents, model)
        train = pack_text(train_documents, tokenizer, length)
        validation = pack_text(held_out, tokenizer, length)
        return RunData(tokenizer, train, validation, _describe(train, validation, length))
    if not settings.train or not settings.validation:
        raise UserError(
            "config: model.data.train and model.data.validation must each name at least one "
            "file (hold out whole documents), or set model.data.packaged."
        )
    needs_tokenizer = source is None and checkpoint is None
    texts = _training_texts(settings) if needs_tokenizer else []
    tokenizer = _tokenizer(source, checkpoint, texts, model)
    train, validation = (
        load_dataset(
            paths,
            format=settings.format,
            tokenizer=tokenizer,
            seq_length=length,
            bad_lines=settings.bad_lines,
            columns=settings.columns,
            key=f"model.data.{name}",
        )
        for name, paths in (("train", settings.train), ("validation", settings.validation))
    )
    return RunData(tokenizer, train, validation, _describe(train, validation, length))

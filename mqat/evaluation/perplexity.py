"""A text under a checkpoint (perplexity, quality by linear), or under an exported directory alone."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from mqat.checkpoints.load_model import load_model
from mqat.data.documents import ReadStats, read_texts
from mqat.data.packing import PackedDataset, pack_text
from mqat.data.tokenizer import load_tokenizer
from mqat.errors import UserError
from mqat.evaluation.forward import logits
from mqat.runtime import groups
from mqat.verify.verify import open_export


@dataclass(frozen=True)
class Perplexity:
    """A text's mean loss per token in nats.

    Attributes:
        loss: Over `tokens`.
        tokens: Labels that were predicted.
        tokens_left_out: After the last full window; the text's first token, never a label, is in
            neither number.
    """

    loss: float
    tokens: int
    tokens_left_out: int


def _windows(text: Path, tokenizer: object, seq_length: int) -> PackedDataset:
    return pack_text(read_texts([text], "error", ReadStats()), tokenizer, seq_length)


def _check_length(path: Path, seq_length: int, longest: int) -> None:
    if seq_length > longest:
        raise UserError(
            f"{path}: sequences of {seq_length} tokens are longer than its max_position_embeddings="
            f"{longest}; evaluate with --seq-length {longest} or less."
        )


def _perplexity(windows: PackedDataset, compute_logits: Callable[[Tensor], Tensor]) -> Perplexity:
    loss = 0.0
    for row in windows.tokens.long():
        scores = compute_logits(row[None, :-1])[0].float()
        loss += float(F.cross_entropy(scores, row[1:], reduction="sum"))
    tokens = windows.loss_mask.numel()
    return Perplexity(loss / tokens, tokens, windows.dropped_tokens)


def checkpoint_perplexity(
    path: Path,
    text: Path,
    *,
    seq_length: int,
    precision: str = "32",
    lowered: bool = False,
    compiled: bool = False,
) -> Perplexity:
    """Of a checkpoint; also reads HF directories and GGUF.

    Raises:
        ValueError: As `load_model` and `read_texts`.
    """
    model = load_model(path, precision=precision, lowered=lowered, compiled=compiled)
    _check_length(path, seq_length, model.config.max_position_embeddings)
    windows = _windows(text, model.tokenizer, seq_length)
    found = _perplexity(windows, lambda tokens: logits(model.chunks, tokens).cpu())
    groups.finalize()
    return found


def checkpoint_quality(
    path: Path,
    text: Path,
    *,
    seq_length: int,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
) -> dict[str, Any]:
    """`evaluation.quality.quality_report` of a checkpoint, on every rank; groups stay open.

    Raises:
        ValueError: As `load_model` and `read_texts`; or nothing is quantized.
    """
    model = load_model(path, tensor_parallel=tensor_parallel, pipeline_parallel=pipeline_parallel)
    from megatron.core import parallel_state

    from mqat.evaluation.forward import run_layers
    from mqat.evaluation.quality import quality_report

    rows = _windows(text, model.tokenizer, seq_length).tokens.long()[:, :-1]
    positions = torch.arange(seq_length)[None]
    steps = [
        [{"tokens": row[None], "position_ids": positions, "attention_mask": None}] for row in rows
    ]
    group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    return quality_report(model.chunks, lambda: run_layers(model.chunks, steps), group=group)


def export_perplexity(directory: Path, text: Path, *, seq_length: int) -> Perplexity:
    """Perplexity of an exported directory, computed by the independent reader.

    Raises:
        ValueError: The directory's config cannot be used; names the first problem.
    """
    reader = open_export(directory)
    _check_length(directory, seq_length, reader.max_positions)
    return _perplexity(_windows(text, load_tokenizer(directory), seq_length), reader.logits)

"""A text under a model: its perplexity, or a checkpoint's quality by linear."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mqat.checkpoints.load_model import load_model
from mqat.data.documents import ReadStats, read_texts
from mqat.data.packing import begin_tokens, join_documents, pack_text
from mqat.errors import UserError
from mqat.evaluation.scoring import Request, score, total_loss, windows
from mqat.evaluation.text_model import TextModel


@dataclass(frozen=True)
class Perplexity:
    """A text's mean loss per token in nats.

    Attributes:
        loss: Over `tokens`.
        tokens: All of the text but what the tokenizer begins texts with; where that is nothing, all but
            the first, which nothing stands before.
    """

    loss: float
    tokens: int


def text_perplexity(
    model: TextModel,
    text: Path,
    *,
    seq_length: int,
    stride: int | None = None,
    batch_size: int = 4,
) -> Perplexity:
    """Of a text's tokens (`Perplexity.tokens`); the same on every rank, all of which call.

    Args:
        model: What predicts it.
        text: File or folder, as `read_texts`.
        seq_length: Tokens that a window holds.
        stride: Tokens that are predicted in a window after the first one, behind at least `seq_length` -
            `stride` others; None: `seq_length`, so that windows follow one another. The last window
            predicts what is left, behind as many tokens as it has room for.
        batch_size: Windows at once.

    Raises:
        UserError: Windows are longer than the model's sequences or shorter than the stride, or the text
            has fewer than two tokens.
    """
    if seq_length > model.longest:
        raise UserError(
            f"sequences of {seq_length} tokens are longer than the model's max_position_embeddings="
            f"{model.longest}; evaluate with --seq-length {model.longest} or less."
        )
    stride = seq_length if stride is None else stride
    if not 1 <= stride <= seq_length:
        raise UserError(
            f"--stride {stride} must be between 1 and --seq-length {seq_length}: every token is "
            "predicted once."
        )
    documents = read_texts([text], "error", ReadStats())
    asked = _windows(documents, model.tokenizer, seq_length, stride)
    tokens = sum(len(request.continuation) for request in asked)
    if not tokens:
        raise UserError(f"{text}: has one token, which is not predicted, so give more.")
    return Perplexity(total_loss(score(model, asked, batch_size=batch_size)) / tokens, tokens)


def _windows(
    documents: Sequence[str], tokenizer: Any, seq_length: int, stride: int
) -> list[Request]:
    """Windows of all documents joined; of each alone where the tokenizer begins texts with a token.

    Every window begins with it then, as every sequence did that such a model was trained on.
    """
    begin = begin_tokens(tokenizer)
    if not begin:
        return list(windows(join_documents(documents, tokenizer)[0].tolist(), seq_length, stride))
    room = seq_length - len(begin)
    if room < 1:
        raise UserError(
            f"sequences of {seq_length} tokens hold no more than the {len(begin)} that the tokenizer "
            "begins a text with; lengthen them (--seq-length)."
        )
    return [
        Request([*begin, *request.context], request.continuation)
        for document in documents
        for request in windows(
            join_documents([document], tokenizer)[0].tolist()[len(begin) :],
            room,
            min(stride, room),
            first=0,
        )
    ]


def checkpoint_quality(
    path: Path,
    text: Path,
    *,
    seq_length: int,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
) -> tuple[dict[str, Any], int]:
    """`evaluation.quality.quality_report` of a checkpoint, and of how many tokens; groups stay open.

    Raises:
        ValueError: As `load_model` and `read_texts`; or nothing is quantized.
    """
    model = load_model(path, tensor_parallel=tensor_parallel, pipeline_parallel=pipeline_parallel)
    from megatron.core import parallel_state

    from mqat.evaluation.forward import run_layers
    from mqat.evaluation.quality import quality_report

    texts = read_texts([text], "error", ReadStats())
    rows = pack_text(texts, model.tokenizer, seq_length).tokens.long()[:, :-1]
    positions = torch.arange(seq_length)[None]
    steps = [
        [{"tokens": row[None], "position_ids": positions, "attention_mask": None}] for row in rows
    ]
    group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    report = quality_report(model.chunks, lambda: run_layers(model.chunks, steps), group=group)
    return report, rows.numel()

"""Greedy text from a model, to look at."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mqat.errors import UserError
from mqat.evaluation.forward import logits
from mqat.parallel.quantized_module import unwrapped


def generate_greedy(chunks: Sequence[Any], tokens: Tensor, count: int, *, stop: int) -> list[int]:
    """`count` greedy tokens after the prompt `tokens` [1, s], or fewer if `stop` comes up.

    The whole sequence is recomputed for each token: meant for looking at a model, not for serving. It
    ends at the model's `max_position_embeddings`, too.

    Raises:
        UserError: The prompt is longer than that.
    """
    longest = int(unwrapped(chunks)[0].max_sequence_length)
    if tokens.shape[1] > longest:
        raise UserError(
            f"a prompt of {tokens.shape[1]} tokens is longer than max_position_embeddings={longest}; "
            "shorten it."
        )
    sequence = tokens
    for _ in range(min(count, longest - tokens.shape[1])):
        best = int(logits(chunks, sequence)[0, -1].argmax())
        if best == stop:
            break
        sequence = torch.cat([sequence, torch.tensor([[best]])], dim=1)
    return [int(token) for token in sequence[0, tokens.shape[1] :]]

"""Greedy text from a model, to look at."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mqat.evaluation.forward import logits


def generate_greedy(chunks: Sequence[Any], tokens: Tensor, count: int, *, stop: int) -> list[int]:
    """`count` greedy tokens after the prompt `tokens` [1, s], or fewer if `stop` comes up.

    The whole sequence is recomputed for each token: meant for looking at a model, not for serving.
    """
    sequence = tokens
    for _ in range(count):
        best = int(logits(chunks, sequence)[0, -1].argmax())
        if best == stop:
            break
        sequence = torch.cat([sequence, torch.tensor([[best]])], dim=1)
    return [int(token) for token in sequence[0, tokens.shape[1] :]]

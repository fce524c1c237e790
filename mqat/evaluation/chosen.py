"""Logits of chosen tokens: a pass through a Megatron model whose head computes no others.

    hidden states [s, b, h] before the head  ->  those of n chosen tokens [n, 1, h]  ->  [n, Vp/tp]

Under sequence parallelism the head gathers whole sequences, and the choice comes after it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch import Tensor

from mqat.evaluation.forward import (
    Microbatch,
    eval_mode,
    forward_logits,
    run_microbatches,
    true_vocab_size,
)
from mqat.models.structure import OUTPUT_LAYER
from mqat.parallel.context import whole_sequences
from mqat.parallel.quantized_module import unwrapped
from mqat.parallel.quantized_step import quantized_step
from mqat.runtime.groups import device

_BLOCK = 512  # tokens whose logits of the whole vocabulary are held at once, beside the model's own


class Chosen:
    """The tokens of a batch whose logits are wanted, by row and place; changed before each pass.

    Attributes:
        rows: int64 [n].
        places: int64 [n].
    """

    def __init__(self) -> None:
        self.rows = self.places = torch.zeros(0, dtype=torch.int64)

    def set(self, rows: Tensor, places: Tensor) -> None:
        """Of the next pass."""
        self.rows, self.places = rows.to(device()), places.to(device())

    def before_head(self, _: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """A hook of the head: its input [s, b, h] -> [n, 1, h]."""
        return given[0][self.places, self.rows][:, None], *given[1:]

    def of(self, logits: Tensor) -> Tensor:
        """[n, Vp/tp] of what the model returned: of all tokens [b, s, Vp/tp], or of those [1, n, ..]."""
        n = len(self.rows)
        return logits[0] if logits.shape[:2] == (1, n) else logits[self.rows, self.places]


@contextmanager
def looking_at(chunks: Sequence[Any], chosen: Chosen) -> Iterator[None]:
    """Inside, passes are forward only, of whole sequences, and the head computes `chosen` alone.

    Weights must not change inside: each is quantized once.
    """
    heads = [
        getattr(model, OUTPUT_LAYER.name)
        for model in unwrapped(chunks)
        if model.post_process and not model.config.sequence_parallel
    ]
    handles = [head.register_forward_pre_hook(chosen.before_head) for head in heads]
    try:
        with (
            torch.no_grad(),
            eval_mode(chunks),
            whole_sequences(chunks),
            quantized_step(chunks, for_backward=False),
        ):
            yield
    finally:
        for handle in handles:
            handle.remove()


def padding_multiple(chunks: Sequence[Any]) -> int:
    """What sequences are padded to a multiple of: sequence parallelism cuts them evenly."""
    config = unwrapped(chunks)[0].config
    return int(config.tensor_model_parallel_size) if config.sequence_parallel else 1


def chosen_logits(
    chunks: Sequence[Any], tokens: Tensor, positions: Tensor, chosen: Chosen
) -> Tensor | None:
    """This rank's columns [n, Vp/tp] inside `looking_at`; None on all stages but the last.

    `tokens` and `positions` are int64 [b, s], padded (`padding_multiple`), the same on all ranks that
    share the model.
    """
    batch: Microbatch = {"tokens": tokens, "position_ids": positions, "attention_mask": None}
    # An interleaved pipeline needs one microbatch per stage; the copies' results are not used.
    copies = 1 if len(chunks) == 1 else parallel_state.get_pipeline_model_parallel_world_size()
    results = run_microbatches(
        forward_logits, chunks, [batch] * copies, forward_only=True, are_whole=True
    )
    return chosen.of(results[0]["logits"]) if results else None


def from_last_stage(found: Tensor) -> Tensor:
    """The last stage's values of `found`, on every stage."""
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    dist.broadcast(found, src=last, group=parallel_state.get_pipeline_model_parallel_group())
    return found


def whole_vocabulary(chunks: Sequence[Any], local: Tensor) -> Tensor:
    """float32 [n, V] without padding, of the columns [n, Vp/tp] that ranks hold."""
    gathered = gather_from_tensor_model_parallel_region(local)
    return gathered[:, : true_vocab_size(chunks)].float()


def log_probabilities(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Natural logarithms of the targets' probabilities, and the likeliest tokens.

    Args:
        logits: float32 [n, V].
        targets: int64 [n, t].

    Returns:
        float32 [n, t]; int64 [n], of equal ones the first.
    """
    return logits.log_softmax(dim=-1).gather(1, targets), logits.argmax(dim=-1)


def score_chosen(
    chunks: Sequence[Any], tokens: Tensor, rows: Tensor, places: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """`log_probabilities` behind chosen tokens of sequences [b, s], on the CPU of every rank.

    Args:
        chunks: This rank's, at any layout; ranks that share the model call with the same tokens.
        tokens: int64 [b, s], padded on the right, which causal attention ignores.
        rows: int64 [n], of the tokens behind which `targets` are expected.
        places: int64 [n], likewise.
        targets: int64 [n, t].
    """
    chosen = Chosen()
    chosen.set(rows, places)
    tokens = torch.nn.functional.pad(tokens, (0, -tokens.shape[1] % padding_multiple(chunks)))
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    targets = targets.to(device())
    with looking_at(chunks, chosen):
        local = chosen_logits(chunks, tokens, positions, chosen)
        # Small enough to be exact in float64, so that one broadcast takes both.
        found = torch.zeros(len(rows), targets.shape[1] + 1, dtype=torch.float64, device=device())
        if local is not None:
            blocks = zip(
                local.split(_BLOCK), targets.split(_BLOCK), found.split(_BLOCK), strict=True
            )
            for columns, wanted, into in blocks:
                logs, best = log_probabilities(whole_vocabulary(chunks, columns), wanted)
                into[:, :-1], into[:, -1] = logs, best
    found = from_last_stage(found).cpu()
    return found[:, :-1].float(), found[:, -1].long()

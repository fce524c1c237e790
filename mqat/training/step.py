"""Forward and backward of one optimizer step, through Megatron's own pipeline schedules."""

from collections.abc import Sequence
from typing import Any

from mqat.evaluation.forward import Microbatch, forward_loss, loss_totals, run_microbatches
from mqat.parallel.quantized_step import quantized_step


def forward_backward(
    chunks: Sequence[Any], microbatches: Sequence[Microbatch], *, step: int | None = None
) -> tuple[float, float]:
    """Accumulates gradients of the mean loss per token over the global batch.

    Args:
        chunks: DDP-wrapped model chunks of this rank.
        microbatches: This data-parallel rank's share of the global batch; whole sequences, of which
            each context-parallel rank takes its part.
        step: As for `quantized_step`.

    Returns:
        Loss summed over the global batch's counted tokens, and their number, on every rank.
    """
    with quantized_step(chunks, step=step):
        results = run_microbatches(forward_loss, chunks, microbatches, forward_only=False)
    return loss_totals(results)

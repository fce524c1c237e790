"""Forward and backward of one optimizer step, through Megatron's own pipeline schedules."""

from collections.abc import Sequence
from typing import Any

from mqat.evaluation.forward import Microbatch, forward_loss, run_microbatches, totals
from mqat.parallel.activation_offload import offloaded_activations
from mqat.parallel.quantized_step import quantized_step
from mqat.training.distillation import Teacher


def forward_backward(
    chunks: Sequence[Any],
    microbatches: Sequence[Microbatch],
    *,
    step: int | None = None,
    teacher: Teacher | None = None,
    offloads_activations: bool = False,
) -> dict[str, float]:
    """Accumulates gradients of the mean loss per token over the global batch.

    Args:
        chunks: DDP-wrapped model chunks of this rank.
        microbatches: This data-parallel rank's share of the global batch; whole sequences, of which
            each context-parallel rank takes its part.
        step: As for `quantized_step`.
        teacher: Whose distribution takes the place of the labels; None: cross entropy.
        offloads_activations: They wait in host memory for their backward pass, on CUDA.

    Returns:
        Sums over the global batch's counted tokens, on every rank: `loss`, `tokens` (their number) and,
        with a teacher, the parts of the loss.
    """
    forward_step = forward_loss if teacher is None else teacher.forward_step(microbatches)
    offload = offloaded_activations(is_enabled=offloads_activations)
    with quantized_step(chunks, step=step), offload:
        results = run_microbatches(forward_step, chunks, microbatches, forward_only=False)
    return totals(results, ("loss", "tokens", *(teacher.reported if teacher else ())))

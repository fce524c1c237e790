"""An export verified with the training model at hand; that model with what training recorded."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from mqat.checkpoints.archive import unpacked
from mqat.checkpoints.reader import CheckpointReader
from mqat.checkpoints.recorded import RecordedLogits, batch, read_recorded
from mqat.evaluation.forward import (
    logits,
    served_logits,
    served_weights,
    true_vocab_size,
)
from mqat.evaluation.watch_layers import noisy_linears, watched_layers
from mqat.parallel.quantized_module import all_quantizers
from mqat.runtime.groups import decided_by_main, is_main, on_all_ranks
from mqat.specs.describe import unwrapped
from mqat.verify.agreement import NOISE, agreement
from mqat.verify.layers import LayerComparison
from mqat.verify.verify import Report, open_export, run_export, verify_export

_LAYER_TOKENS = (
    64  # of the first sequence: more show nothing new, and each layer's are held at once
)


def record_logits(chunks: Sequence[Any]) -> RecordedLogits | None:
    """Of the fixed batch, for `save_checkpoint`; None while a schedule has quantizers off or coarser.

    Args:
        chunks: This rank's, at any layout; all ranks call.
    """
    if not _computes_as_saved(chunks):
        return None
    tokens, positions = batch(true_vocab_size(chunks), unwrapped(chunks)[0].max_sequence_length)
    found = logits(chunks, tokens)[:, positions].cpu()
    return RecordedLogits(tokens, positions, found, _dtype(chunks))


def _computes_as_saved(chunks: Sequence[Any]) -> bool:
    return all(q.is_enabled and q.active_format is None for q in all_quantizers(chunks))


def _dtype(chunks: Sequence[Any]) -> torch.dtype:
    dtype: torch.dtype = unwrapped(chunks)[0].config.params_dtype
    return dtype


def verify_with_model(
    export: Path,
    checkpoint: Path,
    chunks: Sequence[Any],
    tokens: Tensor,
    dtype: str,
    *,
    is_rebuilt: bool,
) -> Report:
    """`verify_export`, then every linear and layer on the model's own inputs, then logits; on all ranks.

    Args:
        export: As for `verify_export`.
        checkpoint: It was made from.
        chunks: The training model, at any layout.
        tokens: int64 [b, s], the same on every rank.
        dtype: Of unquantized tensors in the export.
        is_rebuilt: The model was made from the checkpoint, so that it is compared with what training
            recorded there.

    Returns:
        What the first rank found; of others what they know.

    Raises:
        UserError: On every rank, as `verify_export`.
    """
    report = Report()
    with on_all_ranks():
        if is_main():
            report = verify_export(export, reference=checkpoint)
    if not decided_by_main(lambda: report.ok):
        return report
    if is_rebuilt:
        _compare_with_recorded(report, checkpoint, chunks)
    with unpacked(export) as directory:
        with on_all_ranks():
            comparison = LayerComparison(
                open_export(directory), CheckpointReader(checkpoint, crc="none"), _dtype(chunks)
            )
        _compare_layers(report, comparison, chunks, tokens, dtype)
        expected = served_logits(chunks, tokens, dtype)
        with on_all_ranks():
            if is_main() and report.ok:
                run_export(report, comparison.decoder, tokens, expected.cpu(), _dtype(chunks))
    return report


def _compare_layers(
    report: Report, comparison: LayerComparison, chunks: Sequence[Any], tokens: Tensor, dtype: str
) -> None:
    """Each stage's first rank judges its layers; the report of the first rank gets all of it."""
    is_judge = (
        parallel_state.get_tensor_model_parallel_rank()
        == 0
        == parallel_state.get_data_parallel_rank()
    )

    def watch(*seen: Any) -> None:
        if is_judge:
            comparison(*seen)

    with served_weights(chunks, dtype), watched_layers(chunks, watch):
        logits(chunks, tokens[:1, :_LAYER_TOKENS])
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(
        found, (comparison.problems, comparison.worst_linear, comparison.worst_layer)
    )
    problems, linear, layer = zip(*found, strict=True)
    report.problems += [problem for of_rank in problems for problem in of_rank]
    report.worst_linear, report.worst_layer = max(linear), max(layer)


def _compare_with_recorded(report: Report, checkpoint: Path, chunks: Sequence[Any]) -> None:
    """Rebuilding must give the model that was saved; noise is of the dtype in which that computed."""
    recorded = read_recorded(checkpoint)
    if recorded is None:
        report.recorded = "no logits were recorded (imported, or older): rebuilding was not tested"
        return
    at, size = recorded.positions, NOISE[recorded.dtype]
    rebuilt = logits(chunks, recorded.tokens)[:, at].cpu()
    with noisy_linears(chunks, size):
        noisy = logits(chunks, recorded.tokens)[:, at].cpu().to(recorded.dtype)
    kept = recorded.logits[
        ..., : rebuilt.shape[-1]
    ]  # a user's own GPTModel does not know its padding
    found, noise = agreement(kept, rebuilt), agreement(rebuilt, noisy)
    report.recorded = f"logits that training recorded: {found} (with noise of {size:.0e}: {noise})"
    if not noise.allows(found):
        report.problems.append(
            f"{checkpoint}: rebuilt from mqat.json it computes other logits than training recorded: "
            f"{found}; noise of the size of rounding explains KL {noise.largest_kl:.2e} and "
            f"{noise.least_top1:.1%}. The description does not say what the model computed."
        )

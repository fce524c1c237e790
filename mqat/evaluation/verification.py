"""An export verified with the training model at hand; that model with what training recorded."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from mqat.checkpoints.archive import unpacked
from mqat.checkpoints.reader import CheckpointReader
from mqat.checkpoints.recorded import RecordedLogits, fixed_batch, read_recorded
from mqat.evaluation.forward import logits, served_logits, served_weights, true_vocab_size
from mqat.evaluation.shared_steps import shared_steps
from mqat.evaluation.watch_layers import noisy_linears, watched_layers
from mqat.models.decoder import DecoderConfig
from mqat.parallel.add_adapters import without_adapters
from mqat.parallel.quantized_module import all_quantizers, unwrapped
from mqat.runtime.groups import (
    any_rank,
    decided_by_main,
    gathered,
    is_main,
    on_all_ranks,
    raise_on_any_rank,
)
from mqat.verify.agreement import NOISE, agreement
from mqat.verify.layers import LayerComparison
from mqat.verify.report import Report
from mqat.verify.verify import open_export, run_export, verify_adapter, verify_export

# Of the first sequence: more show nothing new, and each layer's are held at once.
_LAYER_TOKENS = 64


def record_logits(
    chunks: Sequence[Any], model: DecoderConfig | None = None
) -> RecordedLogits | None:
    """Of the fixed batch, for `save_checkpoint`; None while a schedule has quantizers off or coarser.

    Args:
        chunks: This rank's, at any layout; all ranks call.
        model: The description with which they are saved, if there is one.
    """
    # A stage may be without quantizers; all go the same way, as forward passes are collectives.
    if any_rank(not _computes_as_saved(chunks)):
        return None
    vocab = model.vocab_size if model else true_vocab_size(chunks)
    tokens, positions = fixed_batch(vocab, unwrapped(chunks)[0].max_sequence_length)
    found = logits(chunks, tokens, vocab)[:, positions].cpu()
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

    Adapters beside the weights are no part of the export, and so are left out of what is compared.

    Args:
        export: As for `verify_export`.
        checkpoint: It was made from.
        chunks: The training model, at any layout.
        tokens: int64 [b, s], the same on every rank.
        dtype: Of unquantized tensors in the export.
        is_rebuilt: The model was made from the checkpoint, so that it is compared with what training
            recorded there.

    Returns:
        What the first rank found; on other ranks without the checks of files.

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
    with ExitStack() as opened:
        opened.enter_context(without_adapters(chunks))
        comparison = None
        with on_all_ranks():
            if _is_judge():
                directory = opened.enter_context(unpacked(export))
                reader = CheckpointReader(checkpoint, crc="none")
                comparison = LayerComparison(open_export(directory), reader, _dtype(chunks))
        if decided_by_main(lambda: comparison is not None and comparison.decoder.shares_steps):
            with on_all_ranks():
                reader = CheckpointReader(checkpoint, crc="none")
                opened.enter_context(shared_steps(chunks, reader))
                if comparison is not None:
                    comparison.decoder.is_compared_alike = True
        _compare_layers(report, comparison, chunks, tokens, dtype)
        if not decided_by_main(lambda: report.ok):
            return report
        expected = served_logits(chunks, tokens, dtype)
        with on_all_ranks():
            if is_main():
                assert comparison is not None
                run_export(report, comparison.decoder, tokens, expected.cpu(), _dtype(chunks))
    return report


def verify_adapter_with_model(
    adapter: Path,
    base: Path | None,
    checkpoint: Path,
    chunks: Sequence[Any],
    tokens: Tensor,
    dtype: str,
) -> Report:
    """`verify_adapter`, on all ranks: on a base model, if there is one, against the model's own logits.

    Arguments and errors as for `verify_with_model`; `base` is a Hugging Face directory.
    """
    expected = None if base is None else served_logits(chunks, tokens, dtype).cpu()
    report = Report()
    with on_all_ranks():
        if is_main():
            report = verify_adapter(
                adapter, base=base, reference=checkpoint, tokens=tokens, reference_logits=expected,
                dtype=_dtype(chunks),
            )  # fmt: skip
    return report


def _is_judge() -> bool:
    """Whether this is the first rank of its stage, which compares the layers of that."""
    tp, dp = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
    return tp == dp == 0


def _compare_layers(
    report: Report,
    comparison: LayerComparison | None,
    chunks: Sequence[Any],
    tokens: Tensor,
    dtype: str,
) -> None:
    """Judges compare their layers; the report of every rank gets what all of them found."""
    faults: list[Exception] = []

    def watch(*seen: Any) -> None:
        try:
            if comparison is not None and not faults:
                comparison(*seen)
        except Exception as error:  # raised below: here other ranks wait for this one
            faults.append(error)

    with served_weights(chunks, dtype), watched_layers(chunks, watch):
        logits(chunks, tokens[:1, :_LAYER_TOKENS])
    raise_on_any_rank(faults[0] if faults else None)
    for found in gathered(None if comparison is None else comparison.found()):
        if found is not None:
            problems, linear, layer = found
            report.problems += problems
            report.worst_linear = max(report.worst_linear or 0.0, linear)
            report.worst_layer = max(report.worst_layer or 0.0, layer)


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
    found, noise = agreement(recorded.logits, rebuilt), agreement(rebuilt, noisy)
    report.recorded = f"logits that training recorded: {found} (with noise of {size:.0e}: {noise})"
    if not noise.allows(found):
        report.problems.append(
            f"{checkpoint}: rebuilt from mqat.json it computes other logits than training recorded: "
            f"{found}; noise of the size of rounding explains KL {noise.largest_kl:.2e} and "
            f"{noise.least_top1:.1%}. The description does not say what the model computed."
        )

"""Proof that an exported directory is what was trained, before anybody builds an engine."""

from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from mqat.checkpoints.archive import unpacked
from mqat.checkpoints.reader import CheckpointReader
from mqat.errors import UserError
from mqat.verify.adapter import compare_adapter, read_adapter
from mqat.verify.agreement import NOISE, agreement
from mqat.verify.check import header_problems, value_problems
from mqat.verify.compare import compare_with_checkpoint
from mqat.verify.decoder import SERVED_OTHERWISE, Decoder
from mqat.verify.export import Export
from mqat.verify.formats import huggingface, trtllm
from mqat.verify.report import Report
from mqat.verify.served_model import ServedModel, read_json

# Problems a layer from which on it is not a tensor that is damaged but another checkpoint.
_OTHER_CHECKPOINT = 1


def compare_logits(report: Report, served: Tensor, reference: Tensor, noisy: Tensor) -> None:
    """Adds the agreement of two logit tensors [b, s, V] to a report; a problem if noise is less.

    Args:
        report: Gets the numbers.
        served: Of the export.
        reference: Of the training model.
        noisy: Of the export with noise of the size of rounding (`agreement.NOISE`).
    """
    found, noise = agreement(reference, served), agreement(served, noisy)
    report.positions = found.positions
    report.mean_kl, report.top1_agreement = found.kl, found.top1
    report.noise_kl, report.noise_top1_agreement = noise.kl, noise.top1
    report.max_abs_difference = float((served - reference).abs().max())
    if not noise.allows(found):
        report.problems.append(
            f"logits differ from the training model's: {found} of {found.positions}; with noise of the "
            f"size of rounding the export differs from itself by {noise} (so that at most "
            f"{noise.largest_kl:.2e} and at least {noise.least_top1:.1%} are its own rounding)"
        )


def _open(directory: Path, problems: list[str]) -> Export | None:
    """The export with its headers checked; complaints go to `problems`, None if it is unusable."""
    if not directory.is_dir():
        problems.append(f"{directory}: no such directory")
        return None
    adapter = huggingface if is_huggingface(directory) else trtllm
    export = adapter.read_config(directory, problems)
    if export is None:
        return None
    export.stages = adapter.find_ranks(directory, export, problems)
    if not export.stages:
        return None
    problems += [p for ranks in export.stages for rank in ranks for p in rank.open(directory)]
    problems += header_problems(export) if not problems else []
    return None if problems else export


def verify_export(
    export: Path,
    *,
    reference: Path | None = None,
    tokens: Tensor | None = None,
    reference_logits: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Report:
    """Checks what `mqat export` wrote: statically, against its checkpoint, and by running it.

    Args:
        export: A TensorRT-LLM checkpoint directory, a Hugging Face one, or a `.qnemo` archive.
        reference: mqat checkpoint it was made from; every tensor is then compared bit for bit.
        tokens: int64 [b, s] to run through the decoder, if nothing is wrong before.
        reference_logits: The training model's fake-quantized logits for `tokens`, [b, s, V].
        dtype: In which these were computed.

    Raises:
        ValueError: An unreadable archive or reference, or tokens and logits that do not fit the model.
    """
    report = Report()
    with unpacked(export) as directory:
        opened = _open(directory, report.problems)
        if opened is None:
            return report
        _describe(report, opened)
        report.problems += value_problems(opened)
        if reference is not None:
            report.checkpoint = str(reference)
            report.problems += _compared(opened, reference)
            report.compared_with_checkpoint = True
        if tokens is not None and not report.problems:
            run_export(report, Decoder(opened), tokens, reference_logits, dtype)
    return report


def verify_adapter(
    directory: Path,
    *,
    base: Path | None = None,
    reference: Path | None = None,
    tokens: Tensor | None = None,
    reference_logits: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Report:
    """Checks adapters that `mqat export --format peft` wrote; arguments and errors as `verify_export`.

    `base`: Hugging Face directory on which they are run.
    """
    report = Report(num_files=1)
    beside = read_adapter(directory, report.problems)
    if reference is not None and not report.problems:
        report.checkpoint = str(reference)
        report.problems += compare_adapter(beside, CheckpointReader(reference))
        report.compared_with_checkpoint = True
    opened = None if base is None else _open(base, report.problems)
    if opened is not None and not report.problems:
        layers = range(opened.model.value("num_layers"))
        modules = {m.name for layer in layers for m in opened.modules(layer)}
        report.problems += [f"{base}: has no {name}" for name in sorted(beside.keys() - modules)]
        if tokens is not None and not report.problems:
            run_export(report, Decoder(opened, beside), tokens, reference_logits, dtype)
    return report


def _describe(report: Report, export: Export) -> None:
    """Adds what is in the directory, for people."""
    model = export.model
    ranks = [rank for stage in export.stages for rank in stage]
    report.num_files = sum(len(rank.files) for rank in ranks)
    report.num_tensors = sum(len(rank.found) for rank in ranks)
    layout = f"TP {model.tp} x PP {model.pp}"
    report.form = "Hugging Face" if model.form == "hf" else f"TensorRT-LLM for {layout}"
    stored = Counter(
        str(module.storage)
        for layer in range(model.layers_per_stage)
        for module in export.modules(layer)
    )
    report.linears = {kind: count * model.pp for kind, count in stored.most_common()}
    report.num_linears = sum(report.linears.values())


def _compared(export: Export, reference: Path) -> list[str]:
    """Problems of the comparison with a checkpoint; many of them have one cause, which comes first."""
    problems = list(compare_with_checkpoint(export, CheckpointReader(reference)))
    if len(problems) > _OTHER_CHECKPOINT * export.model.value("num_layers"):
        problems.insert(
            0,
            f"{len(problems)} of its tensors and settings are not those of {reference}: the export was "
            "made from another checkpoint",
        )
    return problems


def run_export(
    report: Report,
    decoder: Decoder,
    tokens: Tensor,
    reference_logits: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Runs an export that nothing is wrong with so far; arguments and errors as for `verify_export`.

    Noise is as large as what `dtype` rounds, or as what servers change on purpose.
    """
    _check_tokens(decoder.model.value("vocab_size"), tokens, reference_logits)
    served = decoder.logits(tokens)
    if not torch.isfinite(served).all():
        report.problems.append("logits hold NaN or infinity")
    elif reference_logits is not None:
        layers = range(decoder.model.value("num_layers"))
        changes = any(decoder.serves_otherwise(number) for number in layers)
        report.noise = SERVED_OTHERWISE if changes else NOISE[dtype]
        noisy = decoder.logits(tokens, noise=report.noise).to(dtype).float()
        compare_logits(report, served, reference_logits, noisy)


def is_huggingface(directory: Path) -> bool:
    """Whether `config.json` is that of a Hugging Face model (TensorRT-LLM's has no `model_type`)."""
    return "model_type" in read_json(directory / "config.json", [])


def is_export(directory: Path) -> bool:
    """Whether only the decoder here can run it: rank files, or quantized Hugging Face tensors."""
    if not is_huggingface(directory):
        return directory.is_dir() and any(directory.glob("rank*.safetensors"))
    return bool(read_json(directory / "config.json", []).get("quantization_config"))


def read_export(directory: Path) -> Export:
    """An exported directory, its headers checked; a ValueError names the first problem."""
    problems: list[str] = []
    export = _open(directory, problems)
    if export is None:
        raise UserError(f"{directory}: {problems[0]}")
    return export


def read_model(directory: Path) -> ServedModel | None:
    """What `config.json` describes; None if verification would refuse it."""
    problems: list[str] = []
    adapter = huggingface if is_huggingface(directory) else trtllm
    export = adapter.read_config(directory, problems) if directory.is_dir() else None
    return None if export is None or problems else export.model


def open_export(directory: Path, *, keeps_weights: bool = False) -> Decoder:
    """A decoder that computes logits from an exported directory alone; errors as `read_export`."""
    return Decoder(read_export(directory), keeps_weights=keeps_weights)


def _check_tokens(vocab: int, tokens: Tensor, logits: Tensor | None) -> None:
    low, high, shape = int(tokens.min()), int(tokens.max()), (*tokens.shape, vocab)
    if low < 0 or high >= vocab:
        raise UserError(
            f"tokens reach from {low} to {high}, but the exported model has vocab_size={vocab}; "
            "tokenize the text with the exported tokenizer."
        )
    if logits is not None and tuple(logits.shape) != shape:
        raise UserError(
            f"reference logits have shape {tuple(logits.shape)}, but tokens and the exported "
            f"vocabulary need {shape}; compare with the checkpoint of this export."
        )

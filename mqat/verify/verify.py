"""Proof that an exported directory is what was trained, before anybody builds an engine."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mqat.checkpoints.archive import unpacked as unpacked
from mqat.checkpoints.reader import CheckpointReader
from mqat.errors import UserError
from mqat.verify.check import header_problems, value_problems
from mqat.verify.compare import compare_with_checkpoint
from mqat.verify.decoder import Decoder
from mqat.verify.export import Export
from mqat.verify.formats import huggingface, trtllm
from mqat.verify.served_model import read_json

# The reader and the training model sum in different orders. An activation on the boundary between two
# codes may then fall on either side, and with static INT8 activations such flips grow over the layers
# up to the size of the quantization noise itself (SmolLM2-135M, 30 layers: KL 0.013). A wrong decoder
# is far beyond these limits; a wrong tensor is found by the bit-for-bit comparison.
MAX_KL = 5e-2
MIN_TOP1 = 0.90


@dataclass
class Report:
    """What verification found."""

    problems: list[str] = field(default_factory=list)  # each names a file or tensor
    num_files: int = 0  # with weights
    compared_with_checkpoint: bool = False  # every tensor was compared bit for bit
    mean_kl: float | None = None  # from training's next-token distribution to the exported, in nats
    top1_agreement: float | None = None  # share of positions with the same most likely token
    max_abs_difference: float | None = None  # of two logits

    @property
    def ok(self) -> bool:
        """Whether the directory may be served."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe form."""
        return asdict(self) | {"ok": self.ok}

    def headline(self) -> str:
        """One line for people."""
        if not self.ok:
            return f"FAILED, {len(self.problems)} problems, first: {self.problems[0]}"
        parts = [f"verified, {self.num_files} files of weights"]
        if self.compared_with_checkpoint:
            parts.append("every tensor equal to the checkpoint")
        if self.mean_kl is not None and self.top1_agreement is not None:
            parts.append(f"logits: KL {self.mean_kl:.2e}, same top token {self.top1_agreement:.1%}")
        return ", ".join(parts)


def least_top1(positions: int) -> float:
    """The limit of `top1_agreement`: `MIN_TOP1`, less two standard errors of a share of so many."""
    return MIN_TOP1 - 2 * math.sqrt(MIN_TOP1 * (1 - MIN_TOP1) / positions)


def compare_logits(report: Report, served: Tensor, reference: Tensor) -> None:
    """Adds the agreement of two logit tensors [b, s, V] to a report; problems if beyond limits."""
    p, q = reference.float().log_softmax(-1), served.float().log_softmax(-1)
    report.mean_kl = float((p.exp() * (p - q)).sum(-1).mean())
    report.top1_agreement = float((p.argmax(-1) == q.argmax(-1)).float().mean())
    report.max_abs_difference = float((served - reference).abs().max())
    least = least_top1(positions := p[..., 0].numel())
    if not report.mean_kl <= MAX_KL or not report.top1_agreement >= least:
        report.problems.append(
            f"logits differ from the training model's: KL {report.mean_kl:.3g} (at most {MAX_KL}), "
            f"same top token {report.top1_agreement:.1%} of {positions} (at least {least:.1%})"
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
    if not export.stages or any(problem.endswith(": missing") for problem in problems):
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
) -> Report:
    """Checks what `mqat export` wrote: statically, against its checkpoint, and by running it.

    Args:
        export: A TensorRT-LLM checkpoint directory, a Hugging Face one, or a `.qnemo` archive.
        reference: mqat checkpoint it was made from; every tensor is then compared bit for bit.
        tokens: int64 [b, s] to run through the decoder, if nothing is wrong before.
        reference_logits: The training model's fake-quantized logits for `tokens`, [b, s, V].

    Raises:
        ValueError: An unreadable archive or reference, or tokens and logits that do not fit the model.
    """
    report = Report()
    with unpacked(export) as directory:
        opened = _open(directory, report.problems)
        if opened is None:
            return report
        report.num_files = sum(len(rank.files) for ranks in opened.stages for rank in ranks)
        report.problems += value_problems(opened)
        if reference is not None:
            report.problems += compare_with_checkpoint(opened, CheckpointReader(reference))
            report.compared_with_checkpoint = True
        if tokens is None or report.problems:
            return report
        _check_tokens(opened.model.value("vocab_size"), tokens, reference_logits)
        served = Decoder(opened).logits(tokens)
    if not torch.isfinite(served).all():
        report.problems.append("logits hold NaN or infinity")
    elif reference_logits is not None:
        compare_logits(report, served, reference_logits)
    return report


verify_trtllm = verify_hf = verify_export


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


def open_export(directory: Path) -> Decoder:
    """A decoder that computes logits from an exported directory alone; errors as `read_export`."""
    return Decoder(read_export(directory))


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

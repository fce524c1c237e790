"""Proof that a `.nemo` holds what was trained: its own description, and every weight, bit for bit.

Nothing in it is served, so nothing is run: a model with the checkpoint's description and weights
computes what the checkpoint does. That NeMo understands the description is not shown here.
"""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from mqat.checkpoints.folder import Folder
from mqat.checkpoints.reader import CheckpointReader
from mqat.checkpoints.source import open_pretrained
from mqat.checkpoints.torch_dist import TorchDist
from mqat.data.tokenizer import check_fits, load_tokenizer
from mqat.errors import UserError
from mqat.models.decoder import DecoderConfig
from mqat.models.structure import is_in_layer
from mqat.verify.check import same_bytes
from mqat.verify.report import Report

_WEIGHTS, _PREFIX = "model_weights", "model."
_NOT_SAID = "token_ids"  # NeMo 1 has them from the tokenizer


def verify_nemo(archive: Path, reference: Path | None = None) -> Report:
    """Checks what `mqat export --format nemo` wrote.

    Args:
        archive: The `.nemo` file.
        reference: mqat checkpoint it was made from; every tensor is then compared bit for bit.

    Raises:
        UserError: The reference cannot be read.
    """
    report, checkpoint = Report(), None
    if reference is not None:
        checkpoint = CheckpointReader(reference)
        report.checkpoint, report.compared_with_checkpoint = str(reference), True
    try:
        source, folder = open_pretrained(archive), Folder(archive).inside(_WEIGHTS)
        tensors = TorchDist(folder)
        report.num_files = sum(name.endswith(".distcp") for name in folder.names())
        tokenizer = load_tokenizer(source.tokenizer_source)
        check_fits(tokenizer, source.config.vocab_size)
        if checkpoint is not None:
            report.problems += _config_problems(source.config, checkpoint.model)
            if tokenizer.get_vocab() != load_tokenizer(checkpoint.path / "tokenizer").get_vocab():
                report.problems.append(f"{archive}: its tokenizer is not the checkpoint's")
        if not report.problems:
            report.problems += _tensor_problems(tensors, source.config, checkpoint)
    except UserError as error:
        report.problems.append(str(error))
    return report


def _config_problems(found: DecoderConfig, trained: DecoderConfig) -> list[str]:
    said, wanted = asdict(found), asdict(trained)
    return [
        f"model_config.yaml: {name}={said[name]!r}, but the checkpoint has {value!r}"
        for name, value in wanted.items()
        if said[name] != value and name != _NOT_SAID
    ]


def _tensor_problems(
    tensors: TorchDist, model: DecoderConfig, checkpoint: CheckpointReader | None
) -> Iterator[str]:
    """Problems of each tensor, a layer's part at a time."""
    for key, shape in model.checkpoint_shapes().items():
        is_stacked = is_in_layer(key)
        for number in range(shape[0]) if is_stacked else (None,):
            # A table of the checkpoint may be padded.
            rows = slice(0, shape[0]) if number is None else slice(number, number + 1)
            stored = tensors.view(_PREFIX + key, (rows,))
            place = f"tensor {_PREFIX}{key}" + ("" if number is None else f" of layer {number}")
            if not bool(stored.isfinite().all()):
                yield f"{place} holds NaN or infinity"
            elif checkpoint is not None:
                wanted = checkpoint.view(key, (rows,)).to(stored.dtype)
                if not same_bytes(stored, wanted):
                    yield f"{place} is not the checkpoint's"

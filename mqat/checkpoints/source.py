"""Opens whatever a user names as pretrained weights."""

from pathlib import Path

from mqat.checkpoints.adapter import ADAPTER_CONFIG, MergedAdapter
from mqat.checkpoints.gguf import GgufCheckpoint, split_file
from mqat.checkpoints.huggingface import HuggingFaceCheckpoint
from mqat.checkpoints.manifest import DESCRIPTION
from mqat.checkpoints.megatron import MegatronCheckpoint
from mqat.checkpoints.training_checkpoints import is_training_checkpoint, open_training_checkpoint
from mqat.errors import UserError

PretrainedSource = HuggingFaceCheckpoint | GgufCheckpoint | MegatronCheckpoint | MergedAdapter


def open_pretrained(
    path: Path,
    *,
    config_from: Path | None = None,
    tokenizer: Path | None = None,
    base: Path | None = None,
) -> PretrainedSource:
    """A Hugging Face directory, a GGUF file, or a checkpoint of Megatron-LM, Megatron-Bridge or NeMo.

    Args:
        path: Its directory or file; of a split GGUF model, any of its files.
        config_from: Hugging Face directory whose `config.json` describes a training checkpoint.
        tokenizer: Directory of the tokenizer, if it is not to be the model's own.
        base: Model that `path` is a LoRA adapter of; the other arguments are about it.

    Raises:
        UserError: Nothing there, or nothing that can be read; says what was found.
    """
    if base is not None:
        if not (path / ADAPTER_CONFIG).is_file():
            raise UserError(
                f"{path}: is no adapter ({ADAPTER_CONFIG} is missing); leave out --base."
            )
        return MergedAdapter(
            path, open_pretrained(base, config_from=config_from, tokenizer=tokenizer)
        )
    source = _open(path, config_from, tokenizer)
    if config_from is not None and not isinstance(source, MegatronCheckpoint):
        raise UserError(f"{path}: is described by its own files; leave out --config-from.")
    if tokenizer is not None and not isinstance(source, MegatronCheckpoint | MergedAdapter):
        source.tokenizer_source = tokenizer
    return source


def _open(path: Path, config_from: Path | None, tokenizer: Path | None) -> PretrainedSource:
    if path.is_file() and path.suffix == ".gguf":
        return GgufCheckpoint(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or directory.")
    if (path / DESCRIPTION).is_file():
        raise UserError(f"{path}: is a checkpoint of mqat, not a model to import.")
    if is_training_checkpoint(path):
        return open_training_checkpoint(path, config_from=config_from, tokenizer=tokenizer)
    if not path.is_dir():
        raise UserError(f"{path}: not a directory, and no .gguf or .nemo file.")
    if (path / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"{path}: {ADAPTER_CONFIG} makes this an adapter, which is no model by itself; merge it "
            "into its base model: mqat import ADAPTER --base BASE --out CKPT."
        )
    if (path / "config.json").is_file():
        return HuggingFaceCheckpoint(path)
    models = sorted({split_file(file, 1) for file in path.glob("*.gguf")})
    if len(models) == 1:
        return GgufCheckpoint(models[0])
    inside = sorted(p.parent for p in path.glob("*/config.json"))
    found = [str(model.relative_to(path)) for model in (*models, *inside)]
    if found:
        raise UserError(
            f"{path}: holds {len(found)} models ({', '.join(found[:5])}); name one of them."
        )
    raise UserError(
        f"{path}: no pretrained model found. Expected an mqat checkpoint, a Hugging Face directory "
        "(config.json and *.safetensors), a .gguf or .nemo file, or a checkpoint of Megatron-LM or NeMo."
    )

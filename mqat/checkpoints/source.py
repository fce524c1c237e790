"""Opens whatever a user names as pretrained weights."""

from pathlib import Path

from mqat.checkpoints.gguf import GgufCheckpoint, split_file
from mqat.checkpoints.huggingface import HuggingFaceCheckpoint
from mqat.checkpoints.megatron import MegatronCheckpoint
from mqat.checkpoints.training_checkpoints import is_training_checkpoint, open_training_checkpoint
from mqat.errors import UserError

_ADAPTER = "adapter_config.json"
PretrainedSource = HuggingFaceCheckpoint | GgufCheckpoint | MegatronCheckpoint


def open_pretrained(
    path: Path, *, config_from: Path | None = None, tokenizer: Path | None = None
) -> PretrainedSource:
    """A Hugging Face directory, a GGUF file, or a checkpoint of Megatron-LM, Megatron-Bridge or NeMo.

    Args:
        path: Its directory or file; of a split GGUF model, any of its files.
        config_from: Hugging Face directory whose `config.json` describes a training checkpoint.
        tokenizer: Directory of the tokenizer, if it is not to be the model's own.

    Raises:
        UserError: Nothing there, or nothing that can be read; says what was found.
    """
    source = _open(path, config_from, tokenizer)
    if config_from is not None and not isinstance(source, MegatronCheckpoint):
        raise UserError(f"{path}: is described by its own files; leave out --config-from.")
    if tokenizer is not None and not isinstance(source, MegatronCheckpoint):
        source.tokenizer_source = tokenizer
    return source


def _open(path: Path, config_from: Path | None, tokenizer: Path | None) -> PretrainedSource:
    if path.is_file() and path.suffix == ".gguf":
        return GgufCheckpoint(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or directory.")
    if is_training_checkpoint(path):
        return open_training_checkpoint(path, config_from=config_from, tokenizer=tokenizer)
    if not path.is_dir():
        raise UserError(f"{path}: not a directory, and no .gguf or .nemo file.")
    if (path / _ADAPTER).is_file():
        raise UserError(
            f"{path}: {_ADAPTER} makes this an adapter, which is no model by itself; merge it into its "
            "base model (peft: merge_and_unload, then save_pretrained) and import that."
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

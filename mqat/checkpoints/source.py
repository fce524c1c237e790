"""Opens whatever a user names as pretrained weights."""

from pathlib import Path

from mqat.checkpoints.gguf import GgufCheckpoint, split_file
from mqat.checkpoints.huggingface import HuggingFaceCheckpoint
from mqat.errors import UserError

_ADAPTER = "adapter_config.json"
PretrainedSource = HuggingFaceCheckpoint | GgufCheckpoint


def open_pretrained(path: Path) -> PretrainedSource:
    """A Hugging Face directory, a `.gguf` file (or one of several), or a directory with one GGUF model.

    Raises:
        ValueError: Nothing there, or nothing that can be read; says what was found.
    """
    if path.is_file() and path.suffix == ".gguf":
        return GgufCheckpoint(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or directory.")
    if not path.is_dir():
        raise UserError(f"{path}: not a directory, and no .gguf file.")
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
        "(config.json and *.safetensors), or one .gguf file."
    )

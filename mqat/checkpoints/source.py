"""Opens whatever a user names as pretrained weights."""

from pathlib import Path

from mqat.checkpoints.gguf import GgufCheckpoint
from mqat.checkpoints.huggingface import HuggingFaceCheckpoint
from mqat.errors import UserError

PretrainedSource = HuggingFaceCheckpoint | GgufCheckpoint


def open_pretrained(path: Path) -> PretrainedSource:
    """A Hugging Face directory, a `.gguf` file, or a directory holding exactly one `.gguf`.

    Raises:
        ValueError: Nothing there, or nothing that can be read; says what was looked for.
    """
    if path.is_file() and path.suffix == ".gguf":
        return GgufCheckpoint(path)
    if path.is_dir():
        if (path / "config.json").exists():
            return HuggingFaceCheckpoint(path)
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return GgufCheckpoint(files[0])
    if not path.exists():
        raise UserError(f"{path}: no such file or directory.")
    raise UserError(
        f"{path}: no pretrained model found. Expected an mqat checkpoint, a Hugging Face directory "
        "(config.json and *.safetensors), or one .gguf file."
    )

"""`.qnemo`: a TensorRT-LLM directory with the tokenizer's description that NeMo looks for."""

import tarfile
from pathlib import Path

from mqat.errors import UserError

SENTENCEPIECE = "tokenizer.model"

# NeMo finds Hugging Face tokenizers (tokenizer_config.json) by itself; for those, this file would have
# to name a model of the hub or an absolute directory.
_SENTENCEPIECE_YAML = f"""\
library: sentencepiece
type: null
model: {SENTENCEPIECE}
vocab_file: null
merge_file: null
delimiter: null
use_fast: false
sentencepiece_legacy: true
"""


def tokenizer_texts(tokenizer: Path) -> dict[str, str]:
    """Extra files of a `.qnemo`, by name.

    Raises:
        ValueError: The checkpoint has no tokenizer that NeMo could find.
    """
    if (tokenizer / SENTENCEPIECE).is_file():
        return {"tokenizer_config.yaml": _SENTENCEPIECE_YAML}
    if not (tokenizer / "tokenizer_config.json").is_file():
        raise UserError(
            f"{tokenizer}: a .qnemo needs the tokenizer, but neither tokenizer_config.json nor "
            f"{SENTENCEPIECE} is there; import the model with its tokenizer, or export a directory."
        )
    return {}


def write_tar(directory: Path, target: Path) -> None:
    """An uncompressed archive whose members start with `./`; the same bytes for the same content."""

    def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.mtime = member.uid = member.gid = 0
        member.uname = member.gname = ""
        member.mode = 0o755 if member.isdir() else 0o644
        return member

    with tarfile.open(target, "w", format=tarfile.GNU_FORMAT) as archive:
        archive.add(directory, "./", recursive=False, filter=anonymous)
        for path in sorted(directory.rglob("*")):
            name = f"./{path.relative_to(directory)}"
            archive.add(path, name, recursive=False, filter=anonymous)


def is_qnemo_tar(path: Path) -> bool:
    """Whether a file is such an archive."""
    if not path.is_file() or not tarfile.is_tarfile(path):
        return False
    with tarfile.open(path) as archive:
        return {"./config.json", "./rank0.safetensors"} <= set(archive.getnames())

"""The tokenizer of a NeMo checkpoint as a directory that `load_tokenizer` reads.

NeMo names the files of a tokenizer in its configuration and stores them under names of their own.
Tokenizers that it only names, as those of a model hub, are not there.

Sources: NeMo 2.0 `megatron_base_model.py` (_build_tokenizer), `save_restore_connector.py`
(_handle_artifacts) and `nemo/lightning/io`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mqat.checkpoints.folder import Folder, copy_files
from mqat.errors import UserError

_STORED = "nemo:"  # before the name of a file of the archive
_FILES = {"model": "tokenizer.model", "vocab_file": "vocab.json", "merge_file": "merges.txt"}
_OTHERS = ("model_config.yaml", "config.json", "model_weights")  # beside a tokenizer's files
# Give other tokens than the files alone.
_CHANGES = ("special_tokens", "additional_special_tokens", "delimiter")


def nemo1_tokenizer(folder: Folder, said: Any) -> TemporaryDirectory[str] | Path | None:
    """Of `tokenizer` in a `model_config.yaml`.

    Returns:
        A copy of its files, a directory of Hugging Face that it names, or None: it is not here.

    Raises:
        UserError: It names a file that is missing, or changes the tokenizer in a way that is not read.
    """
    if not isinstance(said, Mapping):
        return None
    if said.get("library") == "huggingface" and isinstance(said.get("type"), str):
        return _huggingface(folder, said["type"])
    changes = [key for key in _CHANGES if said.get(key)]
    if changes:
        raise UserError(
            f"{folder.path}: tokenizer.{changes[0]}={said[changes[0]]!r} in model_config.yaml changes "
            "the tokenizer, which is not read from NeMo; import with --tokenizer DIR, a directory with "
            "tokenizer.json."
        )
    named = {key: said[key] for key in _FILES if isinstance(said.get(key), str)}
    stored = {
        name.removeprefix(_STORED): _FILES[key]
        for key, name in named.items()
        if name.startswith(_STORED) or folder.has(name)
    }
    return _copied(folder, stored) if stored else None


def _huggingface(folder: Folder, said: str) -> TemporaryDirectory[str] | Path | None:
    """A directory of this machine, or (`.`) the files of the checkpoint itself."""
    if said == ".":
        here = [name for name in folder.names() if name.split("/")[0] not in _OTHERS]
        is_here = "tokenizer.json" in here or "tokenizer.model" in here
        return _copied(folder, {name: name for name in here}) if is_here else None
    return Path(said) if Path(said).is_dir() else None


def nemo2_tokenizer(folder: Folder, said: Any) -> Path | None:
    """Of `tokenizer` in a `context/model.yaml`; None: it is not here."""
    named = []
    if isinstance(said, Mapping):
        named = [said.get("pretrained_model_name"), said.get("model_path")]
    context = folder.path / "context"
    for name in (*named, "nemo_tokenizer"):
        if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
            continue
        path = context / name
        path = path.parent if path.name == "tokenizer.model" else path
        if path.is_dir() and any(path.glob("tokenizer*")):
            return path
    return None


def _copied(folder: Folder, names: Mapping[str, str]) -> TemporaryDirectory[str]:
    directory = TemporaryDirectory(prefix="mqat-tokenizer-")
    copy_files(folder, names, Path(directory.name))
    if set(names.values()) == {
        "vocab.json",
        "merges.txt",
    }:  # whose files do not say how text is split
        settings = {"tokenizer_class": "GPT2TokenizerFast", "eos_token": "<|endoftext|>"}
        (Path(directory.name) / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory

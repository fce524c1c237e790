"""Reads slices of a Hugging Face Llama directory: `config.json` and `model*.safetensors`."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from mqat.models.llama import LlamaConfig


class HuggingFaceCheckpoint:
    """Lazy view of a directory; only the requested rows and columns are read from disk.

    Attributes:
        config: Model sizes.
        tokenizer_source: Where `AutoTokenizer` finds the tokenizer.

    Raises:
        ValueError: Missing or unreadable files, or a model that is not supported.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tokenizer_source = path
        try:
            self.config = LlamaConfig.from_hf(json.loads((path / "config.json").read_text("utf-8")))
        except (OSError, json.JSONDecodeError, KeyError) as error:
            raise ValueError(
                f"{path / 'config.json'}: not a Hugging Face model config ({error!r})."
            ) from error
        self._files = self._index()

    def _index(self) -> dict[str, Path]:
        """Tensor name -> file; opening each file also checks that it is complete."""
        index_file = self.path / "model.safetensors.index.json"
        files = sorted(self.path.glob("*.safetensors"))
        if index_file.exists():
            names = set(json.loads(index_file.read_text("utf-8"))["weight_map"].values())
            files = [self.path / name for name in sorted(names)]
        if not files:
            raise ValueError(
                f"{self.path}: no *.safetensors file. Pickled weights (*.bin) are not read, because "
                "unpickling can run code; convert with save_pretrained(safe_serialization=True)."
            )
        found: dict[str, Path] = {}
        for file in files:
            try:
                with safe_open(file, framework="pt") as handle:
                    found.update(dict.fromkeys(handle.keys(), file))
            except (OSError, SafetensorError) as error:
                raise ValueError(
                    f"{file}: missing, truncated or not safetensors ({error}); download it again."
                ) from error
        return found

    def has(self, name: str) -> bool:
        """Whether a tensor of this name exists."""
        return name in self._files

    def read(self, name: str, rows: slice, cols: slice | None = None) -> torch.Tensor:
        """Rows, and for matrices columns, of one tensor, in its stored dtype."""
        if name not in self._files:
            raise ValueError(f"{self.path}: tensor {name!r} is missing from the checkpoint.")
        with safe_open(self._files[name], framework="pt") as handle:
            view = handle.get_slice(name)
            return view[rows] if cols is None else view[rows, cols]

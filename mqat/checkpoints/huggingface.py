"""Reads slices of a Hugging Face directory: `config.json` and `model*.safetensors`."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from mqat.errors import UserError
from mqat.models.decoder import DecoderConfig, hf_shapes
from mqat.models.structure import OUTPUT_LAYER


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
            self.config = DecoderConfig.from_hf(
                json.loads((path / "config.json").read_text("utf-8"))
            )
        except (OSError, json.JSONDecodeError, KeyError) as error:
            raise UserError(
                f"{path / 'config.json'}: not a Hugging Face model config ({error!r})."
            ) from error
        self._files = self._index()

    def _index(self) -> dict[str, Path]:
        """Tensor name -> file; opening each file also checks that it is complete."""
        index_file = self.path / "model.safetensors.index.json"
        named = sorted(self.path.glob("model*.safetensors"))
        files = named or sorted(self.path.glob("*.safetensors"))
        if index_file.exists():
            names = set(json.loads(index_file.read_text("utf-8"))["weight_map"].values())
            files = [self.path / name for name in sorted(names)]
        if not files:
            raise UserError(
                f"{self.path}: no *.safetensors file. Pickled weights (*.bin) are not read, because "
                "unpickling can run code; convert with save_pretrained(safe_serialization=True)."
            )
        found: dict[str, Path] = {}
        for file in files:
            try:
                with safe_open(file, framework="pt") as handle:
                    found.update(dict.fromkeys(handle.keys(), file))
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"{file}: missing, truncated or not safetensors ({error}); download it again."
                ) from error
        self._check_names(found)
        return found

    def _check_names(self, found: dict[str, Path]) -> None:
        """Refuses tensors that would be dropped silently: biases, scales of quantized weights, ..."""
        known = {*hf_shapes(self.config), f"{OUTPUT_LAYER.hf}.weight"}
        extra = [n for n in sorted(found) if n not in known and not n.endswith(".inv_freq")]
        if extra:
            raise UserError(
                f"{self.path}: {extra[0]!r} and {len(extra) - 1} more tensors have no place in the "
                f"{self.config.family} model that config.json describes; import an unquantized "
                "checkpoint whose config.json is its own."
            )

    def has(self, name: str) -> bool:
        """Whether a tensor of this name exists."""
        return name in self._files

    def read(self, name: str, rows: slice, cols: slice | None = None) -> torch.Tensor:
        """Rows, and for matrices columns, of one tensor, in its stored dtype."""
        if name not in self._files:
            raise UserError(f"{self.path}: tensor {name!r} is missing from the checkpoint.")
        with safe_open(self._files[name], framework="pt") as handle:
            view = handle.get_slice(name)
            return view[rows] if cols is None else view[rows, cols]

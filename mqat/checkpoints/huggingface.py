"""Reads slices of a Hugging Face directory: `config.json`, and the safetensors transformers reads."""

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mqat.checkpoints.fused_experts import one_by_one
from mqat.checkpoints.hf_config import decoder_config
from mqat.checkpoints.quantized_source import quantized_source
from mqat.checkpoints.stored_tensors import check_layer_count, check_tensors, finite
from mqat.checkpoints.values import is_whole
from mqat.data.strict_json import parse_json
from mqat.errors import UserError
from mqat.models.decoder import DecoderConfig
from mqat.models.family import Family
from mqat.models.hf_keys import hf_shapes

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# safetensors' name of each dtype that holds weights as they are; others are codes of quantized ones.
_DTYPES = {"F64", "F32", "F16", "BF16"}
_ROWS = 4096  # of a vocabulary table, compared at once


class HuggingFaceCheckpoint:
    """Lazy view of a directory; only the requested rows and columns are read from disk.

    Attributes:
        config: Model sizes.
        tokenizer_source: Where `AutoTokenizer` finds the tokenizer.

    Raises:
        ValueError: Missing or unreadable files, a model that is not supported, or files that
            contradict each other.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tokenizer_source = path
        said = read_json(path / "config.json")
        self._quantized = quantized_source(path, said)
        if self._quantized is not None:
            said = {key: value for key, value in said.items() if key != "quantization_config"}
        self.config = decoder_config(said)
        self._files: dict[str, Path] = {}
        self._left_out: set[str] = set()
        shapes: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, str] = {}
        further = _further_layers(said, self.config)
        for file in self._weight_files():
            for name, (shape, dtype) in _header(file).items():
                if name.startswith(further):
                    self._left_out.add(name)
                    continue
                if name in self._files:
                    raise UserError(
                        f"{path}: tensor {name!r} is in {self._files[name].name} and in {file.name}; "
                        "remove the file that does not belong there."
                    )
                self._files[name], shapes[name], dtypes[name] = file, shape, dtype
        self._check_index()
        if self._left_out:
            warnings.warn(
                f"{path}: {len(self._left_out)} tensors of layers after the {self.config.num_layers} of "
                "the model are left out, among them "
                f"{min(self._left_out)!r}: they predict further tokens, which is not built.",
                stacklevel=2,
            )
        if self._quantized is not None:
            shapes, dtypes = self._quantized.take(shapes, dtypes, self._view)
        # Tables of rotary frequencies, masks, once saved by transformers, are computed from config.json.
        family = self.config.architecture
        self._stored: dict[str, str] = {}
        for name in shapes:
            own = self._stored.setdefault(_full_name(name, family), name)
            if own != name:
                raise UserError(
                    f"{path}: tensors {own!r} and {name!r} are the same one; "
                    "remove the one that is not meant."
                )
        kept = {n: own for n, own in self._stored.items() if not n.endswith(family.hf_buffers)}
        shapes = {name: shapes[own] for name, own in kept.items()}
        dtypes = {name: dtypes[own] for name, own in kept.items()}
        shapes, self._places = one_by_one(shapes, self.config)
        dtypes = {name: dtypes[self._places[name].name] for name in shapes}
        table, head = f"{family.embedding.hf}.weight", f"{family.output_layer.hf}.weight"
        has_copy = self.config.tie_word_embeddings and head in shapes
        told = (path, shapes, self.config, "config.json")
        check_layer_count(*told, layer=family.hf_layer)
        wanted = hf_shapes(self.config)
        check_tensors(*told, wanted | ({head: wanted[table]} if has_copy else {}))
        self._check_dtypes(dtypes)
        if has_copy:
            self._check_tied(table, head)

    def _weight_files(self) -> list[Path]:
        """The files that transformers reads: one of a fixed name, else those of the index."""
        path = self.path
        if (path / _SINGLE).is_file():
            if (path / _INDEX).is_file():
                warnings.warn(
                    f"{path}: {_SINGLE} is read, as transformers does; {_INDEX} beside it is of "
                    "another save and is ignored.",
                    stacklevel=4,
                )
            return [path / _SINGLE]
        if (path / _INDEX).is_file():
            return [path / name for name in sorted(set(self._weight_map().values()))]
        found = sorted(f.name for f in path.iterdir() if f.suffix in _OTHERS)
        hints = [text for suffix, text in _OTHERS.items() if any(f.endswith(suffix) for f in found)]
        raise UserError(
            f"{path}: no {_SINGLE} and no {_INDEX}, which transformers reads; found "
            f"{', '.join(found[:3]) or 'no weights'}{' ...' if found[3:] else ''}. "
            f"{hints[0] if hints else 'Download the weights, too.'}"
        )

    def _weight_map(self) -> dict[str, str]:
        index = read_json(self.path / _INDEX)
        found = index.get("weight_map") if isinstance(index, dict) else None
        files: dict[str, Any] = found if isinstance(found, dict) else {}
        is_named = [isinstance(f, str) and f and Path(f).name == f for f in files.values()]
        if not files or not all(is_named):
            raise UserError(
                f"{self.path / _INDEX}: no weight_map from tensors to files of this directory; "
                "download it again."
            )
        return files

    def _check_index(self) -> None:
        """Refuses an index that names other tensors, or other files for them, than there are."""
        if (self.path / _SINGLE).is_file():
            return
        named = {n: f for n, f in self._weight_map().items() if n not in self._left_out}
        held = {name: file.name for name, file in self._files.items()}
        for name in sorted(named.keys() | held.keys()):
            if named.get(name) != held.get(name) and not name.endswith(".inv_freq"):
                raise UserError(
                    f"{self.path}: tensor {name!r} is in {held.get(name, 'no shard')}, but {_INDEX} "
                    f"says {named.get(name, 'nothing of it')}; download the directory again."
                )

    def _check_dtypes(self, dtypes: dict[str, str]) -> None:
        for name, dtype in dtypes.items():
            if dtype not in _DTYPES:
                raise UserError(
                    f"{self.path}: tensor {name!r} is {dtype}, which are codes of quantized weights; "
                    "import the unquantized model."
                )
        selectors = self.config.architecture.selectors
        exact = tuple(selector.hf for selector in selectors if selector.is_float32)
        counts = Counter(dtype for name, dtype in dtypes.items() if not name.endswith(exact))
        if len(counts) > 1:
            told = ", ".join(f"{count} {dtype}" for dtype, count in counts.most_common())
            warnings.warn(
                f"{self.path}: tensors are {told}; each is read as stored, and "
                "held in the run's dtype.",
                stacklevel=3,
            )

    def _check_tied(self, table: str, head: str) -> None:
        """Refuses a head that is not the embedding although config.json says so.

        transformers 4 would compute with the embedding, 5 with the head.
        """
        for start in range(0, self.config.vocab_size, _ROWS):
            rows = slice(start, min(start + _ROWS, self.config.vocab_size))
            if not torch.equal(*(self.read(n, rows, slice(None)).float() for n in (table, head))):
                raise UserError(
                    f"{self.path}: config.json says tie_word_embeddings=true, but {head!r} differs "
                    f"from {table!r}; set it to false if the head is meant, or remove the head."
                )

    def read(self, name: str, rows: slice, cols: slice | None = None) -> torch.Tensor:
        """Rows, and for matrices columns, of one tensor, in its stored dtype.

        Raises:
            UserError: An element is NaN or infinite.
        """
        place = self._places.get(name)
        if place is None:
            raise UserError(f"{self.path}: tensor {name!r} is missing from the checkpoint.")
        own = self._stored[place.name]
        if cols is not None and self._quantized is not None and self._quantized.has(own):
            return finite(self.path, name, self._quantized.read(own, rows, cols, self._view))
        with safe_open(self._files[own], framework="pt") as handle:
            view = handle.get_slice(own)
            if place.expert is not None:
                wanted = slice(place.first_row + rows.start, place.first_row + rows.stop)
                values = view[place.expert : place.expert + 1, wanted, cols or slice(None)][0]
            else:
                values = view[rows] if cols is None else view[rows, cols]
            return finite(self.path, name, values)

    def _view(self, name: str) -> Any:
        """A tensor of the files, of which only what is sliced is read."""
        with safe_open(self._files[name], framework="pt") as handle:
            return handle.get_slice(name)


# Suffix of other files -> what to do with them.
_OTHERS = {
    ".safetensors": "Download the index of the shards, too, or name the file as transformers does.",
    ".gguf": "Name the .gguf file itself.",
    ".bin": "Pickled weights (*.bin) are not read, because unpickling can run code; convert with "
    "save_pretrained(safe_serialization=True).",
    ".pth": "Pickled weights (*.pth) are not read, because unpickling can run code; convert them with "
    "transformers' convert_llama_weights_to_hf.py.",
}


def _further_layers(said: dict[str, Any], model: DecoderConfig) -> tuple[str, ...]:
    """Prefixes of what comes after the last layer, as far as config.json says so."""
    family = model.architecture
    count = said.get(family.hf_further_layers or "", 0) or 0
    if not is_whole(count, 0):
        raise UserError(
            f"config.json: {family.hf_further_layers} is {count!r}, must be an integer of at least 0."
        )
    layers = range(model.num_layers, model.num_layers + count)
    return tuple(family.hf_layer.format(i=layer) for layer in layers)


def _full_name(name: str, family: Family) -> str:
    """As transformers saves whole models; some files are of the model inside."""
    base, head = family.hf_base, family.output_layer.hf
    return name if name.startswith((base, f"{head}.")) else base + name


def _header(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every tensor of a file; opening it also checks that it is complete."""
    try:
        with safe_open(file, framework="pt") as handle:
            views = {name: handle.get_slice(name) for name in handle.keys()}
            return {name: (tuple(v.get_shape()), v.get_dtype()) for name, v in views.items()}
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{file}: missing, truncated or not safetensors ({error}); download it again."
        ) from error


def read_json(file: Path) -> Any:
    """A JSON file; a key that stands twice in an object is an error.

    Raises:
        UserError: No such file, or it is not JSON in UTF-8.
    """
    try:
        return parse_json(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: not readable as JSON ({error}).") from error

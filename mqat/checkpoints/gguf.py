"""Reads slices of a llama.cpp GGUF model, in one file or several; quantized blocks are dequantized.

llama.cpp stores query and key rows of Llama (not of Qwen 2) with the two halves of each head
interleaved; `read` undoes it (transformers/modeling_gguf_pytorch_utils.py, LlamaTensorProcessor, has
the same permutation).
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mqat.checkpoints.gguf_metadata import Metadata, decoder_config
from mqat.checkpoints.stored_tensors import check_layer_count, check_tensors, finite
from mqat.errors import UserError
from mqat.models.decoder import DecoderConfig
from mqat.models.hf_keys import hf_shapes
from mqat.models.structure import (
    GGUF_LAYER,
    QKV,
)

# llama.cpp `llama_split_path`: number and count of a file of several.
_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf$")


def gguf_names(model: DecoderConfig) -> dict[str, str]:
    """Hugging Face name of every tensor that a file of this model may hold -> llama.cpp's.

    Experts of a layer share theirs, [experts, out, in].
    """
    family = model.architecture
    top = {table.hf: table.gguf for table in family.tables}
    top[family.final_norm.hf] = family.final_norm.gguf
    inside = {norm.hf: norm.gguf for norm in model.norms}
    inside |= {part.hf: part.gguf for linear in model.linears for part in linear.parts}
    if model.router is not None:
        inside[model.router.hf] = model.router.gguf
    for layer in range(model.num_layers):
        hf, gguf = family.hf_layer.format(i=layer), GGUF_LAYER.format(i=layer)
        top |= {hf + name: gguf + other for name, other in inside.items()}
    kinds = ("weight", "bias")
    return {f"{a}.{kind}": f"{b}.{kind}" for a, b in top.items() for kind in kinds}


def expert_numbers(model: DecoderConfig) -> dict[str, int]:
    """Hugging Face name of every expert's weight -> its slice of llama.cpp's tensor."""
    prefixes = [model.architecture.hf_layer.format(i=layer) for layer in range(model.num_layers)]
    return {
        f"{prefix}{part.hf}.weight": linear.expert
        for prefix in prefixes
        for linear in model.linears
        for part in linear.parts
        if linear.expert is not None
    }


def split_file(path: Path, number: int) -> Path:
    """The file of that number (from 1) of a split model; of any other, the path itself."""
    match = _SPLIT.match(path.name)
    return path.with_name(f"{match[1]}-{number:05d}-of-{match[3]}.gguf") if match else path


class GgufCheckpoint:
    """Lazy view of a GGUF model (memory-mapped); same interface as `HuggingFaceCheckpoint`.

    Args:
        path: Its file, or any of its files.

    Raises:
        ValueError: The `gguf` package is missing, a file is missing or damaged, the model is of no
            family that is known, or metadata and tensors contradict each other.
    """

    def __init__(self, path: Path) -> None:
        self.path = self.tokenizer_source = split_file(path, 1)
        reader = _open(self.path)
        metadata = Metadata(self.path, reader.fields)
        self._tensors: dict[str, tuple[Path, Any]] = {}
        for file, part in ((self.path, reader), *_siblings(metadata)):
            for tensor in part.tensors:
                if tensor.name in self._tensors:
                    raise UserError(f"{file}: tensor {tensor.name!r} is in an earlier file, too.")
                self._tensors[tensor.name] = file, tensor
        total = metadata.value("split.tensors.count")
        if total not in (None, len(self._tensors)):
            raise UserError(
                f"{self.path}: split.tensors.count={total}, but its files hold {len(self._tensors)}."
            )
        shapes = {name: _shape(tensor) for name, (_, tensor) in self._tensors.items()}
        if "rope_freqs.weight" in shapes:
            raise UserError(
                f"{self.path}: scaled rotary positions (rope_freqs.weight) are not read from GGUF; use "
                "the Hugging Face directory of this model."
            )
        self.config = decoder_config(metadata, shapes)
        family = self.config.architecture
        self._is_interleaved = family.is_interleaved_in_gguf
        # llama.cpp stores what a norm multiplies by.
        self._norms = (*self.config.norms, family.final_norm) if family.zero_centered_gamma else ()

        told = (self.path, shapes, self.config, "its metadata")
        check_layer_count(*told, layer=GGUF_LAYER)
        self._names = gguf_names(self.config)
        self._experts = expert_numbers(self.config)
        wanted = dict[str, tuple[int, ...]]()
        for name, shape in hf_shapes(self.config).items():
            stacked = (self.config.num_experts,) if name in self._experts else ()
            wanted[self._names[name]] = (*stacked, *shape)
        check_tensors(*told, wanted)
        self._check_types()

    def _check_types(self) -> None:
        """Refuses tensors of types that the gguf package cannot dequantize."""
        from gguf.quants import dequantize

        for file, tensor in {t.tensor_type: (f, t) for f, t in self._tensors.values()}.values():
            try:
                dequantize(tensor.data[:1], tensor.tensor_type)
            except (NotImplementedError, KeyError, ValueError) as error:
                raise UserError(
                    f"{file}: tensor {tensor.name!r} is {tensor.tensor_type.name}, which the gguf "
                    "package does not dequantize; use a file of another type, such as Q8_0 or BF16."
                ) from error

    def read(self, name: str, rows: slice, cols: slice | None = None) -> torch.Tensor:
        """Rows, and for matrices columns, of one tensor by its Hugging Face name, as float32."""
        from gguf.quants import dequantize

        own = self._names.get(name, name)
        if own not in self._tensors:
            raise UserError(f"{self.path}: tensor {own!r} is missing.")
        file, tensor = self._tensors[own]
        if cols is None:
            vector = dequantize(tensor.data, tensor.tensor_type)
            found = torch.from_numpy(np.array(vector[self._rows(name, len(vector))[rows]]))
            if name.endswith(tuple(f"{norm.hf}.weight" for norm in self._norms)):
                found = found - 1
            return finite(file, tensor.name, found)
        index = self._rows(name, int(tensor.shape[1]))
        data = tensor.data[self._experts[name]] if name in self._experts else tensor.data
        # Quantization blocks lie along the columns, so only the wanted rows are dequantized.
        block = dequantize(data[index[rows]], tensor.tensor_type)
        return finite(file, tensor.name, torch.from_numpy(np.array(block[:, cols])))

    def _rows(self, name: str, count: int) -> np.ndarray[Any, Any]:
        """Row of the file for each row of the tensor."""
        index = np.arange(count)
        query, key, _ = QKV.parts
        heads = {
            query.hf: self.config.num_attention_heads,
            key.hf: self.config.num_query_groups,
        }.get(".".join(name.split(".")[3:5]))
        if heads is None or not self._is_interleaved:
            return index
        return index.reshape(heads, count // heads // 2, 2).swapaxes(1, 2).reshape(count)


def _open(path: Path) -> Any:
    """The `gguf` package's view of a file."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError(
            f"{path}: reading GGUF needs the 'gguf' package; pip install 'mqat[demo]'."
        ) from error
    if not path.is_file():
        raise UserError(f"{path}: no such file; the model is split over several, all are needed.")
    try:
        return GGUFReader(path)
    except Exception as error:  # of many types, where lengths and types are damaged
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: not a complete GGUF file ({reason[:200]}).") from error


def _siblings(metadata: Metadata) -> list[tuple[Path, Any]]:
    """The other files of a model that is split over several."""
    path = metadata.path
    count = metadata.whole("split.count", 1, least=0)
    match = _SPLIT.match(path.name)
    if count > 1 and (match is None or int(match[3]) != count):
        raise UserError(
            f"{path}: is the first of {count} files, which are found by names that end in "
            f"-00001-of-{count:05d}.gguf; name them so, or merge them (llama-gguf-split --merge)."
        )
    found = []
    for number in range(2, count + 1):
        file = split_file(path, number)
        part = Metadata(file, (reader := _open(file)).fields)
        if part.value("split.no") != number - 1 or part.value("split.count") != count:
            raise UserError(
                f"{file}: split.no={part.value('split.no')}, split.count={part.value('split.count')}: "
                f"is not file {number} of {count}."
            )
        found.append((file, reader))
    if metadata.whole("split.no", 0, least=0) != 0:
        raise UserError(f"{path}: split.no={metadata.value('split.no')}: is not the first file.")
    return found


def _shape(tensor: Any) -> tuple[int, ...]:
    """In torch's order; GGUF's has the innermost dimension first."""
    return tuple(int(size) for size in reversed(tensor.shape))

"""Reads slices of a llama.cpp GGUF file; quantized blocks are dequantized.

llama.cpp stores query and key rows of Llama (not of Qwen 2) with the two halves of each head
interleaved; `read` undoes it (transformers/modeling_gguf_pytorch_utils.py, LlamaTensorProcessor, has
the same permutation).
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from mqat.errors import UserError
from mqat.models.decoder import FAMILIES, DecoderConfig, check_window
from mqat.models.structure import (
    EMBEDDING,
    FINAL_NORM,
    GGUF_LAYER,
    HF_LAYER,
    OUTPUT_LAYER,
    QKV,
)


def gguf_names(model: DecoderConfig) -> dict[str, str]:
    """Hugging Face name of every tensor that a file of this model may hold -> llama.cpp's."""
    top = {entry.hf: entry.gguf for entry in (EMBEDDING, FINAL_NORM, OUTPUT_LAYER)}
    inside = {norm.hf: norm.gguf for norm in model.norms}
    inside |= {part.hf: part.gguf for linear in model.linears for part in linear.parts}
    for layer in range(model.num_layers):
        hf, gguf = HF_LAYER.format(i=layer), GGUF_LAYER.format(i=layer)
        top |= {hf + name: gguf + other for name, other in inside.items()}
    kinds = ("weight", "bias")
    return {f"{a}.{kind}": f"{b}.{kind}" for a, b in top.items() for kind in kinds}


class GgufCheckpoint:
    """Lazy view of a GGUF file (memory-mapped); same interface as `HuggingFaceCheckpoint`.

    Raises:
        ValueError: The `gguf` package is missing, the file is damaged, or of no family that is known.
    """

    def __init__(self, path: Path) -> None:
        try:
            from gguf import GGUFReader
        except ImportError as error:
            raise UserError(
                f"{path}: reading GGUF needs the 'gguf' package; pip install 'mqat[demo]'."
            ) from error
        self.path = path
        self.tokenizer_source = path
        try:
            reader = GGUFReader(path)
        except (OSError, ValueError, IndexError) as error:
            raise UserError(f"{path}: not a complete GGUF file ({error}).") from error
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.config = self._read_config(reader)
        self._names = gguf_names(self.config)

    def _read_config(self, reader: Any) -> DecoderConfig:
        def value(key: str, default: Any = None) -> Any:
            field = reader.get_field(key)
            if field is None and default is None:
                raise UserError(f"{self.path}: GGUF key {key!r} is missing.")
            return default if field is None else field.contents()

        architecture = value("general.architecture")
        # Mistral's files say `llama`: the first family of an architecture stands for all.
        family = next((f for f in FAMILIES.values() if f.gguf_architecture == architecture), None)
        if family is None:
            known = sorted({f.gguf_architecture for f in FAMILIES.values()})
            raise UserError(f"{self.path}: architecture {architecture!r}; known are {known}.")
        self._is_interleaved = family.is_interleaved_in_gguf
        scaling = value(f"{architecture}.rope.scaling.type", "none")
        if scaling != "none" or "rope_freqs.weight" in self._tensors:
            raise UserError(
                f"{self.path}: scaled rotary positions (rope scaling {scaling!r}) are not read from "
                "GGUF; use the Hugging Face directory of this model."
            )
        context = int(value(f"{architecture}.context_length"))
        # Few converters write the key: a file without it is taken to have no window.
        check_window(int(value(f"{architecture}.attention.sliding_window", context)), context)
        heads = int(value(f"{architecture}.attention.head_count"))
        hidden = int(value(f"{architecture}.embedding_length"))
        first = GGUF_LAYER.format(i=0)
        return DecoderConfig(
            # The tensor, not the metadata key: some converters leave the key out.
            vocab_size=int(self._tensors[f"{EMBEDDING.gguf}.weight"].shape[1]),
            hidden_size=hidden,
            intermediate_size=int(value(f"{architecture}.feed_forward_length")),
            num_layers=int(value(f"{architecture}.block_count")),
            num_attention_heads=heads,
            num_query_groups=int(value(f"{architecture}.attention.head_count_kv", heads)),
            head_dim=int(value(f"{architecture}.attention.key_length", hidden // heads)),
            rms_norm_eps=float(value(f"{architecture}.attention.layer_norm_rms_epsilon")),
            rope_theta=float(value(f"{architecture}.rope.freq_base", 10000.0)),
            max_position_embeddings=context,
            tie_word_embeddings=f"{OUTPUT_LAYER.gguf}.weight" not in self._tensors,
            family=family.name,
            biases=tuple(
                linear.name
                for linear in family.linears
                if any(f"{first}{part.gguf}.bias" in self._tensors for part in linear.parts)
            ),
        )

    def has(self, name: str) -> bool:
        """Whether a tensor of this Hugging Face name exists."""
        return self._names.get(name) in self._tensors

    def read(self, name: str, rows: slice, cols: slice | None = None) -> torch.Tensor:
        """Rows, and for matrices columns, of one tensor by its Hugging Face name, as float32."""
        from gguf.quants import dequantize

        if not self.has(name):
            raise UserError(f"{self.path}: tensor {self._names.get(name, name)!r} is missing.")
        tensor = self._tensors[self._names[name]]
        if cols is None:
            vector = dequantize(tensor.data, tensor.tensor_type)
            return torch.from_numpy(np.array(vector[self._rows(name, len(vector))[rows]]))
        index = self._rows(name, int(tensor.shape[1]))
        # Quantization blocks lie along the columns, so only the wanted rows are dequantized.
        block = dequantize(tensor.data[index[rows]], tensor.tensor_type)
        return torch.from_numpy(np.array(block[:, cols]))

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

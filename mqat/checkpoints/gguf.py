"""Reads slices of a llama.cpp GGUF file; quantized blocks are dequantized.

llama.cpp stores query and key rows of Llama (not of Qwen 2) with the two halves of each head
interleaved; `read` undoes it (transformers/modeling_gguf_pytorch_utils.py, LlamaTensorProcessor, has
the same permutation).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from mqat.models.decoder import (
    FAMILIES,
    HF_EMBEDDING,
    HF_FINAL_NORM,
    HF_LINEARS,
    HF_LM_HEAD,
    LINEARS,
    DecoderConfig,
    check_window,
)

# Without `.weight` and `.bias`, which are the same.
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TOP_NAMES = {
    HF_EMBEDDING: "token_embd.weight",
    HF_FINAL_NORM: "output_norm.weight",
    HF_LM_HEAD: "output.weight",
}


def gguf_name(hf_name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `blk.3.ffn_up.weight`."""
    if hf_name in _TOP_NAMES:
        return _TOP_NAMES[hf_name]
    layer, rest = hf_name.removeprefix("model.layers.").split(".", 1)
    module, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{_LAYER_NAMES[module]}.{kind}"


class GgufCheckpoint:
    """Lazy view of a GGUF file (memory-mapped); same interface as `HuggingFaceCheckpoint`.

    Raises:
        ValueError: The `gguf` package is missing, the file is damaged, or of no family that is known.
    """

    def __init__(self, path: Path) -> None:
        try:
            from gguf import GGUFReader
        except ImportError as error:
            raise ValueError(
                f"{path}: reading GGUF needs the 'gguf' package; pip install 'mqat[demo]'."
            ) from error
        self.path = path
        self.tokenizer_source = path
        try:
            reader = GGUFReader(path)
        except (OSError, ValueError, IndexError) as error:
            raise ValueError(f"{path}: not a complete GGUF file ({error}).") from error
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.config = self._read_config(reader)

    def _read_config(self, reader: Any) -> DecoderConfig:
        def value(key: str, default: Any = None) -> Any:
            field = reader.get_field(key)
            if field is None and default is None:
                raise ValueError(f"{self.path}: GGUF key {key!r} is missing.")
            return default if field is None else field.contents()

        architecture = value("general.architecture")
        # Mistral's files say `llama`: the first family of an architecture stands for all.
        family = next((f for f in FAMILIES.values() if f.gguf_architecture == architecture), None)
        if family is None:
            known = sorted({f.gguf_architecture for f in FAMILIES.values()})
            raise ValueError(f"{self.path}: architecture {architecture!r}; known are {known}.")
        self._is_interleaved = family.is_interleaved_in_gguf
        scaling = value(f"{architecture}.rope.scaling.type", "none")
        if scaling != "none" or "rope_freqs.weight" in self._tensors:
            raise ValueError(
                f"{self.path}: scaled rotary positions (rope scaling {scaling!r}) are not read from "
                "GGUF; use the Hugging Face directory of this model."
            )
        context = int(value(f"{architecture}.context_length"))
        # Few converters write the key: a file without it is taken to have no window.
        check_window(int(value(f"{architecture}.attention.sliding_window", context)), context)
        heads = int(value(f"{architecture}.attention.head_count"))
        hidden = int(value(f"{architecture}.embedding_length"))
        return DecoderConfig(
            # The tensor, not the metadata key: some converters leave the key out.
            vocab_size=int(self._tensors["token_embd.weight"].shape[1]),
            hidden_size=hidden,
            intermediate_size=int(value(f"{architecture}.feed_forward_length")),
            num_layers=int(value(f"{architecture}.block_count")),
            num_attention_heads=heads,
            num_query_groups=int(value(f"{architecture}.attention.head_count_kv", heads)),
            head_dim=int(value(f"{architecture}.attention.key_length", hidden // heads)),
            rms_norm_eps=float(value(f"{architecture}.attention.layer_norm_rms_epsilon")),
            rope_theta=float(value(f"{architecture}.rope.freq_base", 10000.0)),
            max_position_embeddings=context,
            tie_word_embeddings="output.weight" not in self._tensors,
            family=family.name,
            biases=tuple(
                linear
                for linear in LINEARS
                if any(self.has(f"model.layers.0.{name}.bias") for name in HF_LINEARS[linear])
            ),
        )

    def has(self, name: str) -> bool:
        """Whether a tensor of this Hugging Face name exists."""
        return gguf_name(name) in self._tensors

    def read(self, name: str, rows: slice, cols: slice | None = None) -> torch.Tensor:
        """Rows, and for matrices columns, of one tensor by its Hugging Face name, as float32."""
        from gguf.quants import dequantize

        if not self.has(name):
            raise ValueError(f"{self.path}: tensor {gguf_name(name)!r} is missing.")
        tensor = self._tensors[gguf_name(name)]
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
        heads = {
            "self_attn.q_proj": self.config.num_attention_heads,
            "self_attn.k_proj": self.config.num_query_groups,
        }.get(".".join(name.split(".")[3:5]))
        if heads is None or not self._is_interleaved:
            return index
        return index.reshape(heads, count // heads // 2, 2).swapaxes(1, 2).reshape(count)

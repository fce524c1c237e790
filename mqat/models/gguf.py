"""Reads slices of a llama.cpp GGUF file of a Llama model; quantized blocks are dequantized.

llama.cpp stores query and key weights with the two halves of each head interleaved; `read` undoes
it (transformers/modeling_gguf_pytorch_utils.py, LlamaTensorProcessor, has the same permutation).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from mqat.models.llama import HF_EMBEDDING, HF_FINAL_NORM, HF_LM_HEAD, LlamaConfig

_LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
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
    return f"blk.{layer}.{_LAYER_NAMES[rest]}"


class GgufCheckpoint:
    """Lazy view of a GGUF file (memory-mapped); same interface as `HuggingFaceCheckpoint`.

    Raises:
        ValueError: The `gguf` package is missing, the file is damaged, or not a Llama model.
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

    def _read_config(self, reader: Any) -> LlamaConfig:
        def value(key: str, default: Any = None) -> Any:
            field = reader.get_field(key)
            if field is None and default is None:
                raise ValueError(f"{self.path}: GGUF key {key!r} is missing.")
            return default if field is None else field.contents()

        architecture = value("general.architecture")
        if architecture != "llama":
            raise ValueError(f"{self.path}: architecture {architecture!r}; only 'llama' is read.")
        scaling = value("llama.rope.scaling.type", "none")
        if scaling != "none" or "rope_freqs.weight" in self._tensors:
            raise ValueError(
                f"{self.path}: scaled rotary positions (rope scaling {scaling!r}) are not read from "
                "GGUF; use the Hugging Face directory of this model."
            )
        heads = int(value("llama.attention.head_count"))
        hidden = int(value("llama.embedding_length"))
        return LlamaConfig(
            # The tensor, not the metadata key: some converters leave the key out.
            vocab_size=int(self._tensors["token_embd.weight"].shape[1]),
            hidden_size=hidden,
            intermediate_size=int(value("llama.feed_forward_length")),
            num_layers=int(value("llama.block_count")),
            num_attention_heads=heads,
            num_query_groups=int(value("llama.attention.head_count_kv", heads)),
            head_dim=int(value("llama.attention.key_length", hidden // heads)),
            rms_norm_eps=float(value("llama.attention.layer_norm_rms_epsilon")),
            rope_theta=float(value("llama.rope.freq_base", 10000.0)),
            max_position_embeddings=int(value("llama.context_length")),
            tie_word_embeddings="output.weight" not in self._tensors,
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
            return torch.from_numpy(np.array(vector[rows]))
        num_rows = int(tensor.shape[1])
        index = np.arange(num_rows)
        heads = {
            "self_attn.q_proj.weight": self.config.num_attention_heads,
            "self_attn.k_proj.weight": self.config.num_query_groups,
        }.get(name.split(".", 3)[-1])
        if heads is not None:
            half = num_rows // heads // 2
            index = index.reshape(heads, half, 2).swapaxes(1, 2).reshape(num_rows)
        # Quantization blocks lie along the columns, so only the wanted rows are dequantized.
        block = dequantize(tensor.data[index[rows]], tensor.tensor_type)
        return torch.from_numpy(np.array(block[:, cols]))

"""Random initial weights that do not depend on the parallel layout.

Every tensor is drawn whole from a generator seeded with its name, then sliced: the same model at any
TP and PP. It has the interface of the pretrained sources.
"""

from __future__ import annotations

import math
import zlib

import torch

from mqat.models.decoder import DecoderConfig


class RandomWeights:
    """N(0, std) weights, with residual projections scaled by 1/sqrt(2 L) (GPT-2's rule); norms are 1.

    Biases are N(0, std) too: in the families that have them they are trained, not nothing.

    Args:
        config: Model sizes.
        seed: Mixed into every tensor's own seed.
        std: Standard deviation of embeddings and input projections.
    """

    tokenizer_source = None

    def __init__(self, config: DecoderConfig, seed: int, std: float = 0.02) -> None:
        self.config = config
        self.seed = seed
        self.std = std

    def _shape(self, name: str) -> tuple[int, ...]:
        config = self.config
        attention = config.num_attention_heads * config.head_dim
        key_value = config.num_query_groups * config.head_dim
        by_suffix = {
            "norm.weight": (config.hidden_size,),
            "layernorm.weight": (config.hidden_size,),
            "q_proj.weight": (attention, config.hidden_size),
            "k_proj.weight": (key_value, config.hidden_size),
            "v_proj.weight": (key_value, config.hidden_size),
            "o_proj.weight": (config.hidden_size, attention),
            "gate_proj.weight": (config.intermediate_size, config.hidden_size),
            "up_proj.weight": (config.intermediate_size, config.hidden_size),
            "down_proj.weight": (config.hidden_size, config.intermediate_size),
            "embed_tokens.weight": (config.vocab_size, config.hidden_size),
            "lm_head.weight": (config.vocab_size, config.hidden_size),
        }
        if name.endswith(".bias"):
            return by_suffix[name.removesuffix("bias").rsplit(".", 2)[-2] + ".weight"][:1]
        return next(shape for suffix, shape in by_suffix.items() if name.endswith(suffix))

    def read(self, name: str, rows: slice, cols: slice | None = None) -> torch.Tensor:
        """Rows, and for matrices columns, of the tensor with this Hugging Face name, float32."""
        shape = self._shape(name)
        if name.endswith("norm.weight"):
            return torch.ones(shape)[rows]
        std = self.std
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= math.sqrt(2 * self.config.num_layers)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{name}".encode()))
        drawn = torch.randn(shape, generator=generator).mul_(std)
        return drawn[rows] if cols is None else drawn[rows, cols]

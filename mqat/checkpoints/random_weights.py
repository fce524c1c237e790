"""Random initial weights that do not depend on the parallel layout.

Every tensor is drawn whole from a generator seeded with its name, then sliced: the same model at any
TP and PP. It has the interface of the pretrained sources.
"""

import math
import zlib

import torch

from mqat.models.decoder import DecoderConfig
from mqat.models.hf_keys import hf_shapes


class RandomWeights:
    """N(0, std) weights, with residual projections scaled by 1/sqrt(2 L) (GPT-2's rule).

    Norms multiply by 1. Biases are N(0, std) too, as if they had been trained.

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
        self._shapes = hf_shapes(config)
        residual = (
            part for linear in config.linears if linear.parallel == "row" for part in linear.parts
        )
        self._residual = tuple(f"{part.hf}.weight" for part in residual)
        last = config.architecture.final_norm
        self._norms = tuple(f"{norm.hf}.weight" for norm in (*config.norms, last))

    def read(self, name: str, rows: slice, cols: slice | None = None) -> torch.Tensor:
        """Rows, and for matrices columns, of the tensor with this Hugging Face name, float32."""
        shape = self._shapes[name]
        if name.endswith(self._norms):
            return torch.full(shape, 1.0 - self.config.architecture.zero_centered_gamma)[rows]
        std = self.std
        if name.endswith(self._residual):
            std /= math.sqrt(2 * self.config.num_layers)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{name}".encode()))
        drawn = torch.randn(shape, generator=generator).mul_(std)
        return drawn[rows] if cols is None else drawn[rows, cols]

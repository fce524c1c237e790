"""What a tensor of an exported directory must look like in its file's header."""

from __future__ import annotations

from dataclasses import dataclass

# Of unquantized tensors: name in config.json -> name in safetensors.
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class TensorSpec:
    """Header of a tensor.

    Attributes:
        shape: On one rank.
        dtypes: Allowed ones, as safetensors names them.
        is_replicated: Every tensor-parallel rank holds the same bytes.
    """

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    is_replicated: bool = False

    def __str__(self) -> str:
        """As in messages."""
        return f"{' or '.join(self.dtypes)} {self.shape}"

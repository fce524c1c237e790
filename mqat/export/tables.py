"""Vocabulary tables in exported directories: always in the model's dtype."""

from __future__ import annotations

from collections.abc import Mapping

from mqat.errors import UserError
from mqat.quant.scheme import LinearScheme


def check_exportable(tables: Mapping[str, LinearScheme]) -> None:
    """Refuses quantized tables; meant to run before training.

    TensorRT-LLM excludes `*vocab_embedding` and `*lm_head` from every algorithm; the compressed-tensors
    and ModelOpt readers of vLLM and SGLang quantize linears, of which the head is none.

    Raises:
        ValueError: Names the table, and what would work.
    """
    for name in tables:
        raise UserError(
            f"quantization.rules: {name} is quantized, which no export format here holds: servers read "
            "embedding and lm_head in the model's dtype and would compute other logits. Set "
            "export.format=null, or leave the rule out."
        )

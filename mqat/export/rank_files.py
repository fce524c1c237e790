"""The tensors of one TensorRT-LLM rank file, planned before any is read."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mqat.checkpoints.reader import CheckpointReader
from mqat.export.kv_cache import plan_scales
from mqat.export.linears import ServedLinear, with_bias
from mqat.export.names import (
    TRTLLM_EMBEDDING,
    TRTLLM_FINAL_NORM,
    TRTLLM_LAYER,
    TRTLLM_LINEARS,
    TRTLLM_LM_HEAD,
    TRTLLM_NORMS,
)
from mqat.export.reshard import (
    InferenceRank,
    Rows,
    even_part,
    gate_rows,
    qkv_rows,
    row_blocks,
    up_rows,
    vocab_rows,
)
from mqat.export.stream import TensorPlan
from mqat.export.trtllm import FORMATS, UNQUANTIZED
from mqat.models.decoder import DecoderConfig


def plan_rank(
    reader: CheckpointReader, rank: InferenceRank, dtype: torch.dtype
) -> list[TensorPlan]:
    """Everything in the file of `rank`."""
    model = reader.model
    plans = []
    if rank.is_first_stage:
        name = f"{TRTLLM_EMBEDDING}.weight"
        plans.append(plan_table(reader, name, "embedding.word_embeddings", dtype, rank))
    for local, layer in enumerate(rank.layers(model)):
        plans += _plan_layer(reader, rank, dtype, TRTLLM_LAYER.format(i=local), layer)
    if rank.is_last_stage:
        plans.append(plan_norm(reader, f"{TRTLLM_FINAL_NORM}.weight", None, dtype))
        head = "embedding.word_embeddings" if model.tie_word_embeddings else "output_layer"
        plans.append(plan_table(reader, f"{TRTLLM_LM_HEAD}.weight", head, dtype, rank))
    return plans


def plan_table(
    reader: CheckpointReader, name: str, module: str, dtype: torch.dtype, rank: InferenceRank
) -> TensorPlan:
    """A rank's rows of a vocabulary table, then zero rows that make the parts equal."""
    rows, padding = vocab_rows(reader.model, rank)
    width = reader.model.hidden_size

    def blocks() -> Iterator[Tensor]:
        for block in row_blocks([rows], width):
            for part in block:
                yield reader.view(f"{module}.weight", (part,)).to(dtype)
        yield torch.zeros(padding, width, dtype=dtype)

    return TensorPlan(name, dtype, (rows.stop - rows.start + padding, width), blocks)


def plan_norm(
    reader: CheckpointReader, name: str, layer: tuple[int, str] | None, dtype: torch.dtype
) -> TensorPlan:
    """A norm's weight: the final one, or that of (layer, linear it feeds)."""

    def blocks() -> Iterator[Tensor]:
        if layer is None:
            yield reader.read("decoder.final_layernorm.weight").to(dtype)
            return
        index, linear = layer
        key = f"decoder.layers.{linear}.layer_norm_weight"
        yield reader.read(key, (slice(index, index + 1),))[0].to(dtype)

    return TensorPlan(name, dtype, (reader.model.hidden_size,), blocks)


def _rows_of(model: DecoderConfig, rank: InferenceRank) -> dict[str, Rows]:
    hidden = [slice(0, model.hidden_size)]
    return {
        "attention.qkv": qkv_rows(model, rank),
        "attention.dense": hidden,
        "mlp.fc": gate_rows(model, rank),
        "mlp.gate": up_rows(model, rank),
        "mlp.proj": hidden,
    }


def _cols_of(model: DecoderConfig, rank: InferenceRank, linear: str) -> slice:
    heads, d = even_part(model.num_attention_heads, rank), model.head_dim
    row_parallel = {
        "self_attention.linear_proj": slice(heads.start * d, heads.stop * d),
        "mlp.linear_fc2": even_part(model.intermediate_size, rank),
    }
    return row_parallel.get(linear, slice(0, model.hidden_size))


def _plan_layer(
    reader: CheckpointReader, rank: InferenceRank, dtype: torch.dtype, prefix: str, layer: int
) -> Iterator[TensorPlan]:
    model = reader.model
    for linear, norm in TRTLLM_NORMS.items():
        yield plan_norm(reader, f"{prefix}{norm}.weight", (layer, linear), dtype)
    rows = _rows_of(model, rank)
    for linear, modules in TRTLLM_LINEARS.items():
        cols = _cols_of(model, rank, linear)
        scheme = reader.layers.get(f"decoder.layers.{layer}.{linear}")
        tensors = FORMATS[scheme.name].tensors if scheme else UNQUANTIZED
        for module in modules:
            part = ServedLinear(reader, layer, linear, rows[module], cols, dtype)
            for suffix, make in with_bias(part, tensors).items():
                yield make(part).named(f"{prefix}{module}.{suffix}")
    yield from plan_scales(reader, "trtllm", layer, prefix)

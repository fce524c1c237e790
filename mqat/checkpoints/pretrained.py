"""Fills a built model from a pretrained source; each rank reads only the slices it owns."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mqat.checkpoints.random_weights import RandomWeights
from mqat.checkpoints.source import PretrainedSource
from mqat.models.decoder import (
    HF_EMBEDDING,
    HF_FINAL_NORM,
    HF_LAYER,
    HF_LM_HEAD,
    DecoderConfig,
    hf_parts,
)
from mqat.parallel.layout import local_pieces
from mqat.parallel.learned_scales import scale_rule
from mqat.specs.model import DecoderModel


def _vocab_rows(
    source: PretrainedSource | RandomWeights, name: str, rank: int, parameter: torch.Tensor
) -> torch.Tensor:
    """This rank's rows of an embedding table; rows beyond the true vocabulary are zero."""
    count = parameter.shape[0]
    rows = slice(rank * count, min((rank + 1) * count, source.config.vocab_size))
    local = torch.zeros(parameter.shape, dtype=torch.float32)
    if rows.stop > rows.start:
        local[: rows.stop - rows.start] = source.read(name, rows, slice(None)).float()
    return local


def _local_tensor(
    source: PretrainedSource | RandomWeights,
    model: DecoderConfig,
    name: str,
    parameter: torch.Tensor,
    layer: int,
    rank: int,
    tp: int,
) -> torch.Tensor:
    """Value of one parameter, by its name inside a layer or at the top of the model."""
    if name.startswith("embedding.word_embeddings"):
        return _vocab_rows(source, HF_EMBEDDING, rank, parameter)
    if name.startswith("output_layer"):
        head = HF_EMBEDDING if model.tie_word_embeddings else HF_LM_HEAD
        return _vocab_rows(source, head, rank, parameter)
    if name.startswith("decoder.final_layernorm"):
        return source.read(HF_FINAL_NORM, slice(None))
    short = name.split(".", 3)[3]
    parts = [HF_LAYER.format(i=layer) + part for part in hf_parts(short)]
    if "layernorm" in short:
        return source.read(parts[0], slice(None))
    linear, kind = short.rsplit(".", 1)
    pieces = local_pieces(model, linear, rank, tp)
    if kind == "bias":  # of the same rows; all of them where columns are cut
        return torch.cat([source.read(parts[p.part], p.rows) for p in pieces])
    return torch.cat([source.read(parts[p.part], p.rows, p.cols) for p in pieces])


@torch.no_grad()
def load_pretrained_(
    chunks: Sequence[DecoderModel], source: PretrainedSource | RandomWeights
) -> None:
    """Copies weights into every parameter of `chunks` but scales, in the parameters' dtype.

    Raises:
        ValueError: A tensor is missing or has another shape than the config promises.
    """
    for chunk in chunks:
        tp_group = chunk.pg_collection.tp
        for name, parameter in chunk.named_parameters():
            if scale_rule(parameter) is not None:
                continue  # calibration finds it
            layer = -1
            if name.startswith("decoder.layers."):
                layer = chunk.decoder.layers[int(name.split(".")[2])].layer_number - 1
            value = _local_tensor(
                source, source.config, name, parameter, layer, tp_group.rank(), tp_group.size()
            )
            if value.shape != parameter.shape:
                raise ValueError(
                    f"{name} (layer {layer}): the checkpoint gives shape {tuple(value.shape)}, the "
                    f"config asks for {tuple(parameter.shape)}; config.json and weights disagree."
                )
            parameter.copy_(value)

"""Fills a built model from a pretrained source; each rank reads only the slices it owns."""

from collections.abc import Sequence

import torch

from mqat.checkpoints.random_weights import RandomWeights
from mqat.checkpoints.source import PretrainedSource
from mqat.errors import UserError
from mqat.models.decoder import DecoderConfig
from mqat.models.structure import (
    EMBEDDING,
    FINAL_NORM,
    HF_LAYER,
    OUTPUT_LAYER,
    Table,
    is_in_layer,
    split_name,
)
from mqat.parallel.layout import local_pieces
from mqat.parallel.learned_scales import scale_rule
from mqat.specs.model import DecoderModel


def _vocab_rows(
    source: PretrainedSource | RandomWeights, table: Table, rank: int, parameter: torch.Tensor
) -> torch.Tensor:
    """This rank's rows of an embedding table; rows beyond the true vocabulary are zero."""
    count = parameter.shape[0]
    rows = slice(rank * count, min((rank + 1) * count, source.config.vocab_size))
    local = torch.zeros(parameter.shape, dtype=parameter.dtype)
    if rows.stop > rows.start:
        local[: rows.stop - rows.start] = source.read(f"{table.hf}.weight", rows, slice(None))
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
    module, kind = name.rsplit(".", 1)
    if module == EMBEDDING.name:
        return _vocab_rows(source, EMBEDDING, rank, parameter)
    if module == OUTPUT_LAYER.name:
        table = EMBEDDING if model.tie_word_embeddings else OUTPUT_LAYER
        return _vocab_rows(source, table, rank, parameter)
    if module == FINAL_NORM.name:
        return source.read(f"{FINAL_NORM.hf}.{kind}", slice(None))
    prefix, short = HF_LAYER.format(i=layer), split_name(module)[1]
    norms = {norm.name: norm for norm in model.norms}
    if short in norms:
        return source.read(f"{prefix}{norms[short].hf}.{kind}", slice(None))
    linear = model.linear(short)
    pieces = local_pieces(model, linear, rank, tp)
    names = [f"{prefix}{part.hf}.{kind}" for part in linear.parts]
    if kind == "bias":  # of the same rows; all of them where columns are cut
        return torch.cat([source.read(names[p.part], p.rows) for p in pieces])
    return torch.cat([source.read(names[p.part], p.rows, p.cols) for p in pieces])


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
            if is_in_layer(name):
                layer = chunk.decoder.layers[split_name(name)[0]].layer_number - 1
            value = _local_tensor(
                source, source.config, name, parameter, layer, tp_group.rank(), tp_group.size()
            )
            if value.shape != parameter.shape:
                raise UserError(
                    f"{name} (layer {layer}): the checkpoint gives shape {tuple(value.shape)}, the "
                    f"config asks for {tuple(parameter.shape)}; config.json and weights disagree."
                )
            parameter.copy_(value)

"""Fills a built model from a pretrained source; each rank reads only the slices it owns."""

from collections.abc import Iterator, Sequence
from itertools import chain

import torch

from mqat.checkpoints.random_weights import RandomWeights
from mqat.checkpoints.source import PretrainedSource
from mqat.errors import UserError
from mqat.models.decoder import DecoderConfig
from mqat.models.structure import Linear, Table, is_adapter_key, is_in_layer, split_name
from mqat.parallel.layout import Piece, local_pieces
from mqat.parallel.learned_scales import scale_rule
from mqat.parallel.quantized_module import QuantizedModule
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


def _part_rows(
    source: PretrainedSource | RandomWeights,
    linear: Linear,
    prefix: str,
    kind: str,
    piece: Piece,
) -> torch.Tensor:
    """A piece of one part of a linear, from the module that may hold other parts before it."""
    part = linear.parts[piece.part]
    before = [n for n in linear.hf_modules()[part.hf] if n < piece.part]
    start, rows = linear.rows_of(source.config, before), piece.rows
    if rows.start is None:  # all of them
        rows = slice(0, source.config.size(part.rows))
    rows, name = slice(start + rows.start, start + rows.stop), f"{prefix}{part.hf}.{kind}"
    if kind == "bias":  # of the same rows; all of them where columns are cut
        return source.read(name, rows)
    if linear.is_transposed_in_hf:
        return source.read(name, piece.cols, rows).t()
    return source.read(name, rows, piece.cols)


def local_tensor(
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
    family = model.architecture
    if module == family.output_layer.name and model.tie_word_embeddings:
        module = family.embedding.name
    for table in family.tables:
        if module == table.name and table.rows == "vocab":
            return _vocab_rows(source, table, rank, parameter)
        if module == table.name:
            return source.read(f"{table.hf}.{kind}", slice(None), slice(None))
    if module == family.final_norm.name:
        return source.read(f"{family.final_norm.hf}.{kind}", slice(None))
    prefix, short = family.hf_layer.format(i=layer), split_name(module)[1]
    selectors = {selector.name: selector for selector in model.selectors_of(layer)}
    if selector := selectors.get(f"{short}.{kind}"):
        return source.read(prefix + selector.hf, *(slice(None) for _ in selector.axes))
    norms = {norm.name: norm for norm in model.norms}
    if short in norms:
        return source.read(f"{prefix}{norms[short].hf}.{kind}", slice(None))
    linear = model.linear(short)
    pieces = local_pieces(model, linear, rank, tp)
    return torch.cat([_part_rows(source, linear, prefix, kind, piece) for piece in pieces])


def _corrections(chunk: DecoderModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Buffers that checkpoints hold, which are of routers."""
    for name, module in chunk.named_modules():
        bias = getattr(module, "expert_bias", None)
        if bias is not None:
            yield f"{name}.expert_bias", bias


@torch.no_grad()
def load_pretrained_(
    chunks: Sequence[DecoderModel], source: PretrainedSource | RandomWeights
) -> None:
    """Copies weights into every parameter of `chunks` but scales and adapters, in the parameters' dtype.

    Numbers that correct a router's choice are a buffer; they stay in float32.

    Raises:
        ValueError: A tensor is missing or has another shape than the config promises.
    """
    for chunk in chunks:
        tp_group = chunk.pg_collection.tp
        for name, parameter in chain(chunk.named_parameters(), _corrections(chunk)):
            if scale_rule(parameter) is not None or is_adapter_key(name):
                continue  # calibration finds the one, training the other
            layer, place, group = -1, name, tp_group
            if is_in_layer(name):
                layer = chunk.decoder.layers[split_name(name)[0]].layer_number - 1
            owner, _, kind = name.rpartition(".")
            module = chunk.get_submodule(owner)
            if kind == "weight" and getattr(module, "is_packed", False):
                continue  # `packed_backbone.py` fills it
            if isinstance(module, QuantizedModule) and module.expert_groups is not None:
                # By its number among all experts; this rank's count from zero.
                place, group = f"{module.quantized_name}.{kind}", module.tp_group
            value = local_tensor(
                source, source.config, place, parameter, layer, group.rank(), group.size()
            )
            if value.shape != parameter.shape:
                raise UserError(
                    f"{name} (layer {layer}): the checkpoint gives shape {tuple(value.shape)}, the "
                    f"config asks for {tuple(parameter.shape)}; config.json and weights disagree."
                )
            parameter.copy_(value)

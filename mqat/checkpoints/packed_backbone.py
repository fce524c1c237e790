"""Fills the packed weights of a frozen backbone, one linear at a time: no float copy of more is held."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mqat.checkpoints.pretrained import local_tensor
from mqat.checkpoints.random_weights import RandomWeights
from mqat.checkpoints.reader import CheckpointReader
from mqat.checkpoints.source import PretrainedSource
from mqat.errors import UserError
from mqat.kernels.frozen_codes import FrozenCodes, freeze_weight, frozen_shapes, is_double_nf4
from mqat.kernels.packed_weight import PackedWeight
from mqat.models.decoder import DecoderConfig
from mqat.models.structure import Linear, packed_key, quantizer_key, split_name
from mqat.parallel.layout import Piece, local_pieces, packed_units
from mqat.parallel.linear import QuantizedLinear, quantized_linears
from mqat.quant.granularity import PerGroup
from mqat.quant.qparams import frozen_qparams, statistic_of
from mqat.quant.scheme import TensorScheme

Source = PretrainedSource | RandomWeights | CheckpointReader


@torch.no_grad()
def load_packed_(chunks: Sequence[Any], source: Source) -> None:
    """Packs every linear that was built for it, from a source of float weights, or packed ones.

    Scales are those of a calibrated checkpoint, otherwise of each group's maximum.

    Args:
        chunks: This rank's, from `build_model(..., is_packed=True)`.
        source: Of the model; of a checkpoint, its reader.

    Raises:
        UserError: A weight holds NaN or infinity.
    """
    model = source.model if isinstance(source, CheckpointReader) else source.config
    for name, linear in quantized_linears(chunks).items():
        if linear.is_packed:
            assert linear.scheme is not None and linear.scheme.weight is not None, name
            storage = _storage(name, linear, source, model, linear.scheme.weight)
            linear.packed_weight = PackedWeight(linear.scheme, linear.local_shape, storage)


def _storage(
    name: str, linear: QuantizedLinear, source: Source, model: DecoderConfig, scheme: TensorScheme
) -> FrozenCodes:
    layer, short = split_name(name)
    row, device = model.linear(short), linear.weight.device
    rank, tp = linear.tp_group.rank(), linear.tp_group.size()
    count, unit, axis = packed_units(model, row, scheme)
    if isinstance(source, CheckpointReader) and source.is_packed:
        spans = _unit_spans(count, linear.parts, rank, tp)
        tensors = {
            part: torch.cat([source.read(packed_key(name, part), (s,)) for s in spans]).to(device)
            for part in frozen_shapes(scheme, unit)
        }
        return FrozenCodes(tensors, scheme, unit, axis)
    pieces = local_pieces(model, row, rank, tp)
    if isinstance(source, CheckpointReader):
        weight = _of_checkpoint(source, row, layer, pieces)
    else:
        weight = local_tensor(source, model, f"{name}.weight", linear.weight, layer, rank, tp)
    weight = weight.to(linear.config.params_dtype).to(device)
    if not bool(weight.isfinite().all()):
        raise UserError(f"{name}: weight holds NaN or infinite values; use another source.")
    qparams: dict[str, Tensor] = {}
    if not is_double_nf4(scheme):
        if isinstance(source, CheckpointReader) and name in source.layers:
            qparams = _scales(source, row, name, pieces, scheme)
        else:
            qparams = frozen_qparams(statistic_of(weight, scheme), scheme)
    return freeze_weight(weight, scheme, {n: x.to(device) for n, x in qparams.items()}, unit, axis)


def _unit_spans(count: int, parts: int, rank: int, tp: int) -> list[slice]:
    """Units of a rank: an equal share of every part's."""
    of_part = count // parts
    own = of_part // tp
    return [
        slice(part * of_part + rank * own, part * of_part + (rank + 1) * own)
        for part in range(parts)
    ]


def _rows(source: CheckpointReader, linear: Linear, pieces: Sequence[Piece]) -> list[slice]:
    """Rows of the fused weight that hold some pieces, in order."""
    model, found = source.model, list[slice]()
    for piece in pieces:
        rows = piece.rows
        if rows.start is None:
            rows = slice(0, model.size(linear.parts[piece.part].rows))
        found += linear.fused_rows(model, piece.part, rows)
    return found


def _of_checkpoint(
    source: CheckpointReader, linear: Linear, layer: int, pieces: Sequence[Piece]
) -> Tensor:
    key, lead = source.model.place(linear.key, layer)
    columns = pieces[0].cols
    width = len(range(source.model.size(linear.columns))[columns])
    read = [source.read(key, (*lead, rows, columns)) for rows in _rows(source, linear, pieces)]
    return torch.cat([rows.reshape(-1, width) for rows in read])


def _scales(
    source: CheckpointReader,
    linear: Linear,
    name: str,
    pieces: Sequence[Piece],
    scheme: TensorScheme,
) -> dict[str, Tensor]:
    assert isinstance(scheme.granularity, PerGroup), "check_packable()"
    columns, size = pieces[0].cols, scheme.granularity.size
    if columns.start is not None:
        columns = slice(columns.start // size, columns.stop // size)
    names = ("scale", "zero_point") if scheme.is_asymmetric else ("scale",)
    return {
        part: torch.cat([
            source.read(quantizer_key(name, "weight", part), (rows, columns))
            for rows in _rows(source, linear, pieces)
        ])
        for part in names
    }  # fmt: skip


def is_packed(chunks: Sequence[Any]) -> bool:
    """Whether weights of the model are packed as a frozen backbone; the same on every rank."""
    return any(linear.is_packed for linear in quantized_linears(chunks).values())


def check_packed(chunks: Sequence[Any], reader: CheckpointReader) -> None:
    """Refuses to load packed weights into floats.

    Raises:
        UserError: The checkpoint has packed weights, and the model was built for floats.
    """
    if reader.is_packed and not is_packed(chunks):
        raise UserError(
            f"{reader.path}: its weights are packed, and a model in floats cannot be made of them; use "
            "quantization.compress=true with model.peft, or the checkpoint that it was packed from."
        )

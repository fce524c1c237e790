"""Which global rows and columns of a linear's weight a tensor-parallel rank owns. Pure arithmetic.

Fused weights are cut part by part: chunking `[gate; up]` or `[q; k; v]` naively loads, runs, and is
wrong. Legend: rank `r` of `tp`; `H` hidden, `F` intermediate, `d` head size, `h` heads, `kv` groups.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from mqat.errors import UserError
from mqat.models.decoder import DecoderConfig
from mqat.models.schemes import Scheme, linear_schemes
from mqat.models.structure import Linear, split_name
from mqat.quant.granularity import PerBlock, PerGroup
from mqat.quant.scheme import TensorScheme


@dataclass(frozen=True)
class Piece:
    """A rectangle of one unfused weight: part number in the fused tensor, global rows and columns."""

    part: int
    rows: slice
    cols: slice


def shard_count(model: DecoderConfig) -> int:
    """Largest tensor-parallel size that cuts every linear evenly; every valid size divides it."""
    return math.gcd(*_cut_sizes(model).values())


def _cut_sizes(model: DecoderConfig) -> dict[str, int]:
    """What tensor parallelism cuts, by the name of its size; experts as the rest, if they are cut."""
    names = ["num_attention_heads", "num_query_groups"]
    if model.num_experts == 0 or model.dense_layers:
        names.append("intermediate_size")
    if model.num_experts:
        names.append("expert_intermediate_size")
    if model.shared_intermediate_size:
        names.append("shared_intermediate_size")
    return {name: getattr(model, name) for name in names}


def local_pieces(model: DecoderConfig, linear: Linear, rank: int, tp: int) -> list[Piece]:
    """Pieces whose rows, concatenated in this order, are the local weight of `linear`.

    A rank owns whole query groups where rows go by those (megatron/core/transformer/attention.py,
    get_query_key_value_tensors), and an equal share of each part elsewhere.
    """
    everything = slice(None)
    if linear.parallel == "row":
        columns = model.size(linear.columns) // tp
        return [Piece(0, everything, slice(rank * columns, (rank + 1) * columns))]
    units = linear.units(model) if linear.is_by_query_group else tp
    pieces = []
    for unit in range(rank * units // tp, (rank + 1) * units // tp):
        for number, part in enumerate(linear.parts):
            rows = model.size(part.rows) // units
            pieces.append(Piece(number, slice(unit * rows, (unit + 1) * rows), everything))
    return pieces


def packed_units(
    model: DecoderConfig, linear: Linear, scheme: TensorScheme
) -> tuple[int, tuple[int, int], int]:
    """How a whole weight is cut into units of `kernels.frozen_codes`, which no layout cuts.

    Returns:
        Their number; (rows, columns) of each; the axis along which they lie.
    """
    rows, columns = linear.shape(model)
    shards = shard_count(model)
    if linear.parallel == "column":
        count = shards * linear.separate_parts
        return count, (rows // count, columns), 0
    assert isinstance(scheme.granularity, PerGroup), "check_packable()"
    count = math.gcd(shards, columns // scheme.granularity.size)
    return count, (rows, columns // count), 1


def check_parallel_sizes(
    model: DecoderConfig, *, tp: int, pp: int, virtual_pp: int = 1, ep: int = 1
) -> None:
    """Refuses layouts that would not cut the model evenly.

    Raises:
        UserError: Names the size that is not divisible, and the sizes that would work.
    """
    valid = [n for n in range(1, shard_count(model) + 1) if shard_count(model) % n == 0]
    for size_name, size in _cut_sizes(model).items():
        if size % tp:
            raise UserError(
                f"tensor_model_parallel_size={tp} does not divide {size_name}={size}; "
                f"tensor-parallel sizes that fit this model: {valid}."
            )
    if ep > 1 and (not model.num_experts or model.num_experts % ep):
        fitting = [n for n in range(1, model.num_experts + 1) if model.num_experts % n == 0]
        raise UserError(
            f"expert_model_parallel_size={ep} does not divide num_experts={model.num_experts}; sizes "
            f"that fit this model: {fitting or [1]}."
        )
    stages = pp * virtual_pp
    if model.num_layers % stages:
        fitting = [n for n in range(1, model.num_layers + 1) if model.num_layers % n == 0]
        raise UserError(
            f"pipeline_model_parallel_size={pp} x virtual_pipeline_model_parallel_size="
            f"{virtual_pp} does not divide num_layers={model.num_layers}; "
            f"numbers of stages that fit: {fitting}."
        )


def check_group_sizes(
    model: DecoderConfig,
    layers: Mapping[str, Scheme],
    *,
    tp: int,
    purpose: str,
    expert_tp: int | None = None,
) -> None:
    """Refuses groups and squares that would cross a cut at tensor-parallel size `tp`.

    Caches have none. `purpose`, for the message, is the config key, of training or inference, that set
    `tp`; `expert_tp` is that of experts, if it is another.

    Raises:
        UserError: Names the linear, its local width, and the group sizes that fit.
    """
    for name, scheme in linear_schemes(layers).items():
        linear, cut = model.linear(split_name(name)[1]), (tp, purpose)
        if linear.expert is not None and expert_tp is not None:
            cut = expert_tp, "expert_tensor_parallel_size"
        for kind, operand in scheme.operands.items():
            granularity = operand.granularity
            if isinstance(granularity, PerGroup | PerBlock) and linear.parallel == "row":
                in_features = model.size(linear.columns)
                _check_columns(f"{name}.{kind}", granularity, in_features, *cut)
            if isinstance(granularity, PerBlock):
                _check_rows(f"{name}.{kind}", granularity, model, linear, *cut)


def _check_columns(
    name: str, granularity: PerGroup | PerBlock, in_features: int, tp: int, purpose: str
) -> None:
    local = in_features // tp
    if tp == 1 or local % granularity.size == 0:
        return
    fitting = [size for size in (32, 64, 128, 256) if local % size == 0]
    raise UserError(
        f"{name}: group_size={granularity.size} does not divide in_features_per_partition={local} "
        f"(in_features={in_features}, {purpose}={tp}). Groups of a row-parallel linear may not cross "
        f"ranks; choose a group size that divides {local} (of the usual ones: {fitting or 'none'}), "
        f"or a smaller {purpose}."
    )


def _check_rows(
    name: str, granularity: PerBlock, model: DecoderConfig, linear: Linear, tp: int, purpose: str
) -> None:
    """Squares may cross neither ranks nor fused parts, which are stored and served apart."""
    if linear.parallel == "row":
        return
    for piece in local_pieces(model, linear, 0, tp):
        rows = piece.rows.stop - piece.rows.start
        if rows % granularity.size:
            raise UserError(
                f"{name}: squares of {granularity.size} rows do not divide the {rows} rows of part "
                f"{piece.part} of {linear.name} on a rank ({purpose}={tp}). Squares may cross neither "
                "ranks nor the parts of a fused weight; choose granularity 'channel' or 'group:<size>'."
            )

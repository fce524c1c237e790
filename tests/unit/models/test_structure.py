"""The table of the model: row orders by hand, and that nothing else spells its names."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest

from mqat.models.decoder import DecoderConfig
from mqat.models.structure import (
    CORE_ATTENTION,
    DENSE_LINEARS,
    EMBEDDING,
    FC1,
    PROJ,
    QKV,
    in_layer,
    is_in_layer,
    quantizer_key,
    split_name,
)
from mqat.parallel.layout import local_pieces

ROOT = Path(__file__).parents[3] / "mqat"
# Three query heads a group, heads of two rows: small enough to write the order down.
SMALL = DecoderConfig(
    vocab_size=8, hidden_size=4, intermediate_size=4, num_layers=2, num_attention_heads=6,
    num_query_groups=2, head_dim=2,
)  # fmt: skip

MIXTURE = {
    "family": "mixtral", "num_experts": 3, "experts_per_token": 2, "expert_intermediate_size": 6,
}  # fmt: skip


def rows(parts):
    return [row for part in parts for row in range(part.start, part.stop)]


def test_rows_of_a_fused_query_key_value_weight_by_hand():
    # Group 0: q 0..5, k 6..7, v 8..9; group 1: q 10..15, k 16..17, v 18..19.
    assert rows(QKV.fused_rows(SMALL, 0, slice(0, 12))) == [*range(6), *range(10, 16)]
    assert rows(QKV.fused_rows(SMALL, 0, slice(4, 8))) == [4, 5, 10, 11]
    assert rows(QKV.fused_rows(SMALL, 1, slice(2, 4))) == [16, 17]
    assert rows(QKV.fused_rows(SMALL, 2, slice(0, 4))) == [8, 9, 18, 19]
    assert rows(FC1.fused_rows(SMALL, 1, slice(1, 3))) == [5, 6]


@pytest.mark.parametrize("linear", DENSE_LINEARS, ids=lambda linear: linear.name)
@pytest.mark.parametrize("tp", [1, 2])
def test_the_pieces_of_all_ranks_are_the_fused_weight(linear, tp):
    """What ranks read part by part lies in the fused weight where `fused_rows` says."""
    if linear.parallel == "row":
        pieces = [local_pieces(SMALL, linear, rank, tp) for rank in range(tp)]
        assert rows(p.cols for (p,) in pieces) == list(range(SMALL.size(linear.columns)))
        return
    found = [
        row
        for rank in range(tp)
        for piece in local_pieces(SMALL, linear, rank, tp)
        for row in rows(linear.fused_rows(SMALL, piece.part, piece.rows))
    ]
    assert sorted(found) == list(range(linear.shape(SMALL)[0]))
    if linear.is_by_query_group or tp == 1:  # ranks in order are the weight in order
        assert found == sorted(found)


def test_experts_are_a_dimension_of_the_stored_weight():
    sizes = replace(SMALL, **MIXTURE)
    expert = sizes.linears[-1]
    assert expert.name == "mlp.experts.2.linear_fc2"
    assert FC1.stored_shape(SMALL) == (8, 4)
    assert expert.stored_shape(sizes) == (3, 4, 6)
    assert expert.stored_at == (slice(2, 3),) and FC1.stored_at == ()
    assert sizes.place(expert.key, 1) == (expert.key, (slice(1, 2),))


def test_names_are_taken_apart_as_they_were_put_together():
    name = in_layer(11, PROJ.name)
    assert split_name(name) == (11, PROJ.name) and is_in_layer(name)
    assert not is_in_layer(EMBEDDING.name)
    assert quantizer_key(name, "weight", "scale") == (
        "quantizers.decoder.layers.11.self_attention.linear_proj.weight_scale"
    )


NAMES = (
    *(linear.name.rpartition(".")[2] for linear in DENSE_LINEARS),
    *(part.hf.rpartition(".")[2] for linear in DENSE_LINEARS for part in linear.parts),
    CORE_ATTENTION.name,
    EMBEDDING.name,
    "quantizers.",
    "decoder.layers.",
)


def spelled(path):
    """Names of linears in the string constants of a module, docstrings left out."""
    tree = ast.parse(path.read_text("utf-8"))
    docstrings = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    constants = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        and id(node) not in docstrings
    ]  # fmt: skip
    attributes = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return sorted({n for n in NAMES for text in (*constants, *attributes) if n in text})


def test_no_other_module_spells_the_name_of_a_linear():
    table = ROOT / "models"
    wrong = {
        str(path.relative_to(ROOT)): names
        for path in sorted(ROOT.rglob("*.py"))
        if not path.is_relative_to(table) and (names := spelled(path))
    }
    assert not wrong
    assert spelled(table / "structure.py")  # control

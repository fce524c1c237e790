"""Static checks: what they find without knowing the checkpoint."""

import pytest
import torch

from mqat.verify.storage import int4_codes
from mqat.verify.verify import verify_export
from tests.unit.verify.exports import rewrite

QKV = "transformer.layers.1.attention.qkv"
DENSE = "transformer.layers.1.attention.dense"
FC = "transformer.layers.1.mlp.fc"
PROJ = "transformer.layers.1.mlp.proj"


def found(directory, *parts):
    problems = verify_export(directory).problems
    assert any(all(part in problem for part in parts) for problem in problems), problems


def test_files_missing_and_left_over(broken):
    directory = broken("int8", tp=2)
    (directory / "rank7.safetensors").write_bytes(b"old")
    (directory / "quant_cfg.json").write_text("{}")
    (directory / "rank1.safetensors").unlink()
    found(directory, "rank1.safetensors: missing")
    found(directory, "rank7.safetensors: stale")
    found(directory, "quant_cfg.json: stale")


def test_a_truncated_file(broken):
    directory = broken("int8", tp=2)
    file = directory / "rank1.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    found(directory, "rank1.safetensors: truncated")


@pytest.mark.parametrize(("algorithm", "tp"), [("null", 1), ("int8", 4), ("int4", 4), ("fp8", 2)])
def test_any_tensor_missing_is_named(algorithm, tp, broken):
    """Also with copied key/value heads, whose check reads the tensors of other ranks."""
    directory = broken(algorithm, tp=tp)
    names = []

    def remove_layer_one(tensors):
        for name in [n for n in tensors if n.startswith(("transformer.layers.1.", "lm_head"))]:
            del tensors[name]
            names.append(name)

    rewrite(directory, tp - 1, remove_layer_one)
    assert names
    problems = verify_export(directory).problems
    for name in names:
        assert any(f"rank{tp - 1}.safetensors: {name} is missing" in p for p in problems), name


def test_a_tensor_too_many_of_another_shape_or_dtype(broken):
    directory = broken("int8")

    def change(tensors):
        tensors["lm_head.bias"] = torch.zeros(301)
        tensors[f"{QKV}.weight"] = tensors[f"{QKV}.weight"][:-1]
        tensors[f"{FC}.weights_scaling_factor"] = tensors[f"{FC}.weights_scaling_factor"].half()
        tensors[f"{PROJ}.activation_scaling_factor"] = torch.tensor(0.5)

    rewrite(directory, 0, change)
    found(directory, "lm_head.bias is not expected")
    found(directory, f"{QKV}.weight is I8 (511, 256), expected I8 (512, 256)")
    found(directory, f"{FC}.weights_scaling_factor is F16 (512,), expected F32 (512,)")
    found(directory, f"{PROJ}.activation_scaling_factor is F32 (), expected F32 (1,)")


def set_item(name, index, value):
    def change(tensors):
        tensors[name][index] = value

    return change


@pytest.mark.parametrize(
    ("algorithm", "change", "message"),
    [
        ("null", set_item(f"{DENSE}.weight", (3, 4), float("nan")), f"{DENSE}.weight holds NaN"),
        ("fp8", set_item(f"{QKV}.weight", (0, 0), float("nan")), f"{QKV}.weight holds NaN"),
        ("int8", set_item(f"{FC}.weights_scaling_factor", 0, 0.0), "not positive"),
        ("int8", set_item(f"{FC}.activation_scaling_factor", 0, -1.0), "not positive"),
        ("int8", set_item(f"{FC}.weights_scaling_factor", 0, float("inf")), "NaN or infinity"),
        ("int8", set_item(f"{PROJ}.prequant_scaling_factor", 7, 2.0), "is not all ones"),
        ("int8", set_item(f"{QKV}.weight", (0, 0), -128), "holds the code -128"),
        ("int8", set_item(f"{FC}.activation_scaling_factor", 0, 0.5), "fused kernels need one"),
        ("fp8", set_item(f"{FC}.weights_scaling_factor", 0, 0.5), "fused kernels need one"),
    ],
)
def test_values_that_cannot_be_right(algorithm, change, message, broken):
    directory = broken(algorithm, tp=2)
    for rank in range(2):
        rewrite(directory, rank, change)
    found(directory, message)


def test_ranks_that_differ_where_they_must_not(broken):
    directory = broken("int8", tp=2)
    for name in (
        "transformer.ln_f.weight",
        "transformer.layers.0.post_layernorm.weight",
        f"{DENSE}.weights_scaling_factor",
    ):
        rewrite(directory, 1, set_item(name, 5, 2.0))
        found(directory, f"rank1.safetensors: {name} differs from rank0.safetensors")


def test_padding_rows_that_are_not_zero(broken):
    directory = broken("int8", tp=4)  # 301 tokens on 4 x 76 rows
    rewrite(directory, 3, set_item("lm_head.weight", (-1, 0), 1.0))
    found(directory, "rank3.safetensors: lm_head.weight has padding rows")


@pytest.mark.parametrize("algorithm", ["null", "int8", "int4", "fp8"])
def test_copies_of_a_key_value_head_that_differ(algorithm, broken):
    directory = broken(algorithm, tp=4)  # two heads on four ranks

    def flip(tensors):
        bits = tensors[f"{QKV}.weight"].view(torch.uint8)
        bits[-1, 0] ^= 1

    rewrite(directory, 3, flip)
    found(directory, f"rank3.safetensors: {QKV}.weight holds a copy", "differs from rank2")


@pytest.mark.parametrize("algorithm", ["int8", "int4"])
def test_scales_of_copied_heads_that_differ(algorithm, broken):
    directory = broken(algorithm, tp=4)
    rewrite(directory, 1, set_item(f"{QKV}.weights_scaling_factor", -1, 0.25))
    found(directory, f"rank1.safetensors: {QKV}.weights_scaling_factor holds a copy")


def test_query_heads_of_neighbouring_ranks_may_differ(exported):
    assert verify_export(exported("int8", tp=4)).ok  # control for the two tests above


@pytest.mark.parametrize("algorithm", ["int8", "fp8"])
def test_codes_that_stay_far_below_the_largest(algorithm, broken):
    directory = broken(algorithm, tp=2)

    def shrink(tensors):
        codes = tensors[f"{PROJ}.weight"]
        tensors[f"{PROJ}.weight"] = (codes.float() / 8).to(codes.dtype)

    rewrite(directory, 0, shrink)
    assert verify_export(directory).ok  # an outlier may sit on the other rank
    rewrite(directory, 1, shrink)
    found(directory, f"{PROJ}.weight uses codes up to")


def test_an_all_zero_weight_is_not_a_problem(broken):
    directory = broken("int8")
    rewrite(directory, 0, lambda tensors: tensors[f"{PROJ}.weight"].zero_())
    assert verify_export(directory).ok


def test_int4_codes_by_hand():
    packed = torch.tensor([[0x7F, 0x80 - 256]], dtype=torch.int8)
    assert int4_codes(packed).tolist() == [[-1, 0], [7, -8]]

"""`MIXED_PRECISION` directories: INT4, INT8, FP8 and unquantized linears in one model."""

import json
import shutil

import pytest
import torch

from mqat.export.export import export_trtllm
from mqat.quant.algorithm import named_scheme
from mqat.verify.verify import verify_export
from tests.unit.export.checkpoints import TINY, all_layers, write_checkpoint
from tests.unit.verify.exports import rewrite
from tests.unit.verify.test_reader import TOKENS, relative, served_logits, transformers_logits

FC, PROJ = "transformer.layers.0.mlp.fc", "transformer.layers.0.mlp.proj"


def mixture():
    """The same in both halves of the model, so that two pipeline stages agree."""
    layers = all_layers("int4")
    for index in (0, 2):
        layers[f"decoder.layers.{index}.mlp.linear_fc1"] = named_scheme("fp8")
        layers[f"decoder.layers.{index}.mlp.linear_fc2"] = named_scheme("int8")
        layers[f"decoder.layers.{index}.self_attention.linear_proj"] = named_scheme(
            "int4", group_size=128
        )
        del layers[f"decoder.layers.{index + 1}.self_attention.linear_qkv"]
    return layers


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("mixed") / "c", TINY, mixture())


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("mixed") / "out"
    export_trtllm(checkpoint, out, tensor_parallel=1, dtype="float32")
    return out


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (2, 2)])
def test_every_layout_equals_the_checkpoint_and_computes_the_trained_logits(
    tp, pp, checkpoint, tmp_path
):
    out = tmp_path / "out"
    export_trtllm(checkpoint, out, tensor_parallel=tp, pipeline_parallel=pp, dtype="float32")
    assert verify_export(out, reference=checkpoint).problems == []
    expected = transformers_logits(TINY, mixture(), TOKENS)
    assert relative(served_logits(out, TOKENS), expected) < 1e-2
    for algorithm in ("null", "int8", "int4"):  # control: other models differ
        other = transformers_logits(TINY, all_layers(algorithm), TOKENS)
        assert relative(other, expected) > 3e-2


def test_groups_of_128_need_columns_that_they_divide_on_every_rank(checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"linear_proj: in_features=256 is not a multiple of 512"):
        export_trtllm(checkpoint, tmp_path / "out", tensor_parallel=4)


def edited(directory, change):
    file = directory / "quant_cfg.json"
    found = json.loads(file.read_text())
    change(found["quantized_layers"])
    file.write_text(json.dumps(found))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layers: layers.pop(FC), f"{FC}"),
        (lambda layers: layers.update({FC: {"quant_algo": "W4A16_GPTQ"}}), f"{FC} needs a quant_algo"),
        (lambda layers: layers.update({f"{FC}x": {"quant_algo": "FP8"}}), "is not a linear"),
        (lambda layers: layers[PROJ].update(quant_algo="FP8"), f"{PROJ}.weight is I8"),
        (lambda layers: layers["transformer.layers.1.mlp.fc"].update(group_size=32),
         "group_size=32"),
        (lambda layers: layers["transformer.layers.1.mlp.fc"].update(group_size=128),
         "transformer.layers.1.mlp.fc.weights_scaling_factor is"),
    ],
)  # fmt: skip
def test_a_wrong_quant_cfg_is_named(change, message, checkpoint, exported, tmp_path):
    directory = shutil.copytree(exported, tmp_path / "copy")
    edited(directory, change)
    problems = verify_export(directory, reference=checkpoint).problems
    assert any(message in problem for problem in problems), problems


def test_a_missing_quant_cfg_is_named(exported, tmp_path):
    directory = shutil.copytree(exported, tmp_path / "copy")
    (directory / "quant_cfg.json").unlink()
    assert "quant_cfg.json: unreadable" in verify_export(directory).problems[0]


@pytest.mark.parametrize("name", [f"{FC}.weight", f"{PROJ}.weights_scaling_factor",
                                  "transformer.layers.1.attention.qkv.weight"])  # fmt: skip
def test_a_flipped_bit_is_named(name, checkpoint, exported, tmp_path):
    directory = shutil.copytree(exported, tmp_path / "copy")

    def flip(tensors):
        tensors[name].view(-1).view(torch.uint8)[100] ^= 1

    rewrite(directory, 0, flip)
    problems = verify_export(directory, reference=checkpoint).problems
    assert any(name in problem for problem in problems), problems

"""With the checkpoint at hand, no tensor can be wrong unnoticed."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from mqat.export.export import export_trtllm
from mqat.quant.algorithm import named_scheme
from mqat.quant.scales import compute_amax, compute_scale
from mqat.verify.verify import verify_export
from tests.unit.export.checkpoints import (
    EXPORTABLE,
    TINY,
    UNTIED,
    all_layers,
    tensors_of,
    write_checkpoint,
)
from tests.unit.verify.exports import rewrite

LAYER = "transformer.layers.1."


@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("algorithm", EXPORTABLE)
def test_every_export_equals_its_checkpoint(algorithm, tp, pp, tiny, exported):
    report = verify_export(exported(algorithm, tp, pp), reference=tiny(algorithm))
    assert report.problems == []
    assert report.compared_with_checkpoint and report.num_files == tp * pp


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("algorithm", EXPORTABLE)
def test_in_every_dtype(algorithm, dtype, tiny, exported):
    directory = exported(algorithm, dtype=dtype)
    assert verify_export(directory, reference=tiny(algorithm)).problems == []


@pytest.mark.filterwarnings("ignore:W8A16 checkpoints hold unquantized weights")
@pytest.mark.parametrize("algorithm", EXPORTABLE)
def test_bfloat16_checkpoints_untied_heads_and_unquantized_layers(algorithm, tmp_path):
    layers = all_layers(algorithm)
    for index in (1, 3):
        layers.pop(f"decoder.layers.{index}.mlp.linear_fc1", None)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", UNTIED, layers, dtype=torch.bfloat16)
    for dtype in ("bfloat16", "float16"):
        out = tmp_path / dtype
        export_trtllm(
            checkpoint, out, tensor_parallel=2, pipeline_parallel=2, dtype=dtype,
            allow_requantization=True,
        )  # fmt: skip
        assert verify_export(out, reference=checkpoint).problems == []


def flip(tensor):
    """Flips the lowest bit of an element in the middle."""
    bits = tensor.view(torch.uint8).reshape(-1)
    bits[bits.numel() // 2 & ~3] ^= 1


@pytest.mark.parametrize(
    "algorithm",
    [name if name == "int4" else pytest.param(name, marks=pytest.mark.slow) for name in EXPORTABLE],
)
def test_one_flipped_bit_in_any_tensor_is_found_and_named(algorithm, tiny, exported, tmp_path):
    names = load_file(exported(algorithm) / "rank0.safetensors").keys()
    kinds = [n for n in names if n.startswith(LAYER) or not n.startswith("transformer.layers.")]
    assert len(kinds) >= 10
    directory = shutil.copytree(exported(algorithm), tmp_path / "copy")
    original = (directory / "rank0.safetensors").read_bytes()
    for name in kinds:
        rewrite(directory, 0, lambda tensors, name=name: flip(tensors[name]))
        problems = verify_export(directory, reference=tiny(algorithm)).problems
        assert any(name in problem for problem in problems), (name, problems)
        (directory / "rank0.safetensors").write_bytes(original)
    assert verify_export(directory, reference=tiny(algorithm)).ok  # control: it was the bit


def swap(first, second):
    def change(tensors):
        tensors[first], tensors[second] = tensors[second], tensors[first]

    return change


def swap_with_scales(first, second):
    def change(tensors):
        for name in [n for n in tensors if n.startswith(first + ".")]:
            other = second + name.removeprefix(first)
            tensors[name], tensors[other] = tensors[other], tensors[name]

    return change


def rows(name, *order):
    """Reorders equal row blocks of a tensor."""

    def change(tensors):
        for suffix in ("weight", "weights_scaling_factor"):
            full = f"{name}.{suffix}"
            if full in tensors and tensors[full].shape[0] % len(order) == 0:
                blocks = tensors[full].chunk(len(order))
                tensors[full] = torch.cat([blocks[i] for i in order])

    return change


def times(name, factor):
    def change(tensors):
        tensors[name] = (tensors[name].float() * factor).to(tensors[name].dtype)

    return change


def invert(name):
    def change(tensors):
        tensors[name] = 1 / tensors[name]

    return change


def shift_groups(name):
    def change(tensors):
        tensors[name] = tensors[name].roll(1, dims=1)

    return change


def swap_nibbles(name):
    def change(tensors):
        bits = tensors[name].view(torch.uint8)
        tensors[name] = (bits >> 4 | bits << 4).view(torch.int8)

    return change


def transpose(name):
    def change(tensors):
        tensors[name] = tensors[name].t()

    return change


FC, GATE, QKV = f"{LAYER}mlp.fc", f"{LAYER}mlp.gate", f"{LAYER}attention.qkv"
DENSE, PROJ = f"{LAYER}attention.dense", f"{LAYER}mlp.proj"
FACTOR, STEP = "weights_scaling_factor", "activation_scaling_factor"


@pytest.mark.parametrize(
    ("algorithm", "change", "named"),
    [
        *[(a, swap_with_scales(FC, GATE), f"{FC}.weight") for a in EXPORTABLE],
        # Eight blocks of one head each: q q q q k k v v.
        *[(a, rows(QKV, 4, 5, 2, 3, 0, 1, 6, 7), f"{QKV}.weight") for a in EXPORTABLE],
        *[(a, rows(QKV, 0, 1, 2, 3, 6, 7, 4, 5), f"{QKV}.weight") for a in EXPORTABLE],
        *[(a, rows(QKV, 0, 1, 4, 6, 2, 3, 5, 7), f"{QKV}.weight") for a in EXPORTABLE],
        *[(a, transpose(f"{DENSE}.weight"), f"{DENSE}.weight") for a in ("null", "int8", "fp8")],
        *[(a, times(f"{PROJ}.{FACTOR}", 2), f"{PROJ}.{FACTOR}") for a in ("int8", "int4", "fp8")],
        *[(a, invert(f"{PROJ}.{FACTOR}"), f"{PROJ}.{FACTOR}") for a in ("int8", "int4", "fp8")],
        *[(a, times(f"{DENSE}.{STEP}", 2), f"{DENSE}.{STEP}") for a in ("int8", "fp8")],
        *[(a, invert(f"{DENSE}.{STEP}"), f"{DENSE}.{STEP}") for a in ("int8", "fp8")],
        ("int8", rows(PROJ, 1, 0), f"{PROJ}.weight"),
        ("int8", swap(f"{QKV}.{STEP}", f"{DENSE}.{STEP}"), f"{QKV}.{STEP}"),
        ("int4", shift_groups(f"{PROJ}.{FACTOR}"), f"{PROJ}.{FACTOR}"),
        ("int4", swap_nibbles(f"{FC}.weight"), f"{FC}.weight"),
        ("null", swap(f"{LAYER}input_layernorm.weight", f"{LAYER}post_layernorm.weight"),
         "input_layernorm"),
        ("null", swap(f"{FC}.weight", "transformer.layers.2.mlp.fc.weight"), f"{FC}.weight"),
    ],
)  # fmt: skip
def test_swapped_shifted_and_mis_scaled_tensors_are_named(algorithm, change, named, broken, tiny):
    directory = broken(algorithm)
    rewrite(directory, 0, change)
    report = verify_export(directory, reference=tiny(algorithm))
    assert any(named in problem for problem in report.problems), report.problems


def test_swapped_rank_files_are_found(broken, tiny):
    directory = broken("int8", tp=2)
    first, second = (directory / f"rank{r}.safetensors" for r in range(2))
    first.rename(directory / "x")
    second.rename(first)
    (directory / "x").rename(second)
    assert not verify_export(directory, reference=tiny("int8")).ok


def test_swapped_stages_are_found(broken, tiny):
    directory = broken("fp8", pp=2)
    files = [load_file(directory / f"rank{r}.safetensors") for r in range(2)]

    def layers_from(other):
        def change(tensors):
            tensors |= {n: t for n, t in other.items() if n.startswith("transformer.layers.")}

        return change

    rewrite(directory, 0, layers_from(files[1]))
    rewrite(directory, 1, layers_from(files[0]))
    problems = verify_export(directory, reference=tiny("fp8")).problems
    assert any(p.startswith("stage 0: transformer.layers.0.attention.qkv") for p in problems)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rotary_base", 10001.0),
        ("norm_epsilon", 1e-6),
        ("max_position_embeddings", 256),
        ("rotary_scaling", {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                            "high_freq_factor": 4.0, "original_max_position_embeddings": 64}),
    ],
)  # fmt: skip
def test_a_config_of_another_model_is_named(key, value, broken, tiny):
    directory = broken("null")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {key: value}))
    (problem,) = verify_export(directory, reference=tiny("null")).problems
    assert f"{key}=" in problem and "but the checkpoint has" in problem


def test_the_export_of_another_checkpoint_is_a_problem_not_a_crash(exported, tiny, tmp_path):
    for algorithm in ("null", "int4", "fp8"):
        assert not verify_export(exported("int8"), reference=tiny(algorithm)).ok
    shorter = replace(TINY, num_layers=2)
    other = write_checkpoint(tmp_path / "other", shorter, {})
    assert not verify_export(exported("null"), reference=other).ok


def test_a_layer_quantized_in_only_one_of_the_two_is_named(exported, tmp_path):
    name, layers = "decoder.layers.1.mlp.linear_fc2", all_layers("int8")
    state = tensors_of(TINY, layers)
    kept = {key: t for key, t in state.items() if not key.startswith(f"quantizers.{name}.")}
    del layers[name]
    checkpoint = write_checkpoint(tmp_path / "checkpoint", TINY, layers, tensors=kept)
    problems = verify_export(exported("int8"), reference=checkpoint).problems
    assert problems == [f"stage 0: {PROJ}: quantized in only one of checkpoint and export"]


def test_scales_recomputed_from_the_trained_weights_are_found(tmp_path, tiny):
    """What other exporters do after training moved the weights."""
    state = tensors_of(TINY, all_layers("int8"))
    scheme = named_scheme("int8").weight
    for name in all_layers("int8"):
        index, linear = name.removeprefix("decoder.layers.").split(".", 1)
        weight = state[f"decoder.layers.{linear}.weight"][int(index)]
        amax = compute_amax(weight, scheme.granularity)
        state[f"quantizers.{name}.weight_scale"] = compute_scale(amax, scheme.format)
    recomputed = write_checkpoint(tmp_path / "recomputed", TINY, all_layers("int8"), tensors=state)
    export_trtllm(recomputed, tmp_path / "out", tensor_parallel=1)
    problems = verify_export(tmp_path / "out", reference=tiny("int8")).problems
    assert any("qkv.weights_scaling_factor is not the frozen scale" in p for p in problems)

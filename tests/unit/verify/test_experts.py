"""Exported mixtures of experts: what servers read, what verify makes of it, and what it notices."""

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from mqat.export.export import export_hf
from mqat.models.structure import quantizer_key
from mqat.quant.functional import fake_quantize
from mqat.verify.verify import verify_export
from tests.unit.export.checkpoints import (
    MIXTRAL,
    QWEN3_MOE,
    all_layers,
    tensors_of,
    write_checkpoint,
)

TOKENS = torch.randint(0, 301, (2, 24), generator=torch.Generator().manual_seed(1))
MODELS = {"mixtral": MIXTRAL, "qwen3_moe": QWEN3_MOE}
# The experts alone, or everything; names of what is stored of one linear.
CASES = [
    ("mixtral", "null", None, ["weight"]),
    ("mixtral", "int4-experts", None, ["weight_packed", "weight_scale", "weight_shape"]),
    ("qwen3_moe", "int8_pc_pt", None, ["weight", "weight_scale"]),
    ("qwen3_moe", "fp8-experts", "modelopt", ["input_scale", "weight", "weight_scale"]),
    (
        "mixtral",
        "nvfp4-experts",
        "modelopt",
        ["input_scale", "weight", "weight_scale", "weight_scale_2"],
    ),
]
EXPERT = {"mixtral": "block_sparse_moe.experts.1.w1", "qwen3_moe": "mlp.experts.1.gate_proj"}
ROUTER = {"mixtral": "block_sparse_moe.gate", "qwen3_moe": "mlp.gate"}


def layers_of(algorithm, model):
    name, _, which = algorithm.partition("-")
    layers = all_layers(name, model, group_size=32)
    return {n: scheme for n, scheme in layers.items() if not which or ".experts." in n}


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case[:3])))
def case(request, tmp_path_factory):
    """(family, schemes, checkpoint, directory, names of tensors); shared, so never changed."""
    family, algorithm, style, names = request.param
    root, model = tmp_path_factory.mktemp("moe"), MODELS[family]
    layers = layers_of(algorithm, model)
    checkpoint = write_checkpoint(root / "checkpoint", model, layers, cuts=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one input scale a layer in vLLM
        export_hf(checkpoint, root / "out", style=style, dtype="float32")
    return family, layers, checkpoint, root / "out", names


def transformers_logits(directory):
    """Of a directory with plain weights."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return model(TOKENS).logits


def weights_on_their_grid(model, layers):
    """Tensors of the checkpoint with what training multiplied by, in plain floats."""
    state = tensors_of(model, layers)
    for name, scheme in layers.items():
        index, linear = name.removeprefix("decoder.layers.").split(".", 1)
        row = model.linear(linear)
        weight = state[row.key][row.stored_at(int(index))].view(row.shape(model))
        scale = state[quantizer_key(name, "weight", "scale")]
        weight.copy_(fake_quantize(weight, scale, scheme.weight.format, scheme.weight.granularity))
    return {key: value for key, value in state.items() if not key.startswith("quantizers.")}


def test_a_clean_directory_passes_and_computes_what_transformers_does(case, tmp_path):
    family, layers, checkpoint, directory, _ = case
    has_inputs = any(scheme.input is not None for scheme in layers.values())
    expected = None
    if not has_inputs:
        model = MODELS[family]
        state = weights_on_their_grid(model, layers)
        plain = write_checkpoint(tmp_path / "plain", model, {}, tensors=state)
        export_hf(plain, tmp_path / "out", dtype="float32")
        expected = transformers_logits(tmp_path / "out")
    report = verify_export(
        directory, reference=checkpoint, tokens=TOKENS, reference_logits=expected
    )
    assert report.problems == [] and report.compared_with_checkpoint
    if expected is not None:
        assert report.max_abs_difference < 1e-4


def test_names_are_those_that_servers_read_and_routers_are_ignored(case):
    family, layers, _, directory, names = case
    stored = load_file(directory / "model.safetensors")
    prefix = f"model.layers.1.{EXPERT[family]}."
    assert sorted(n.removeprefix(prefix) for n in stored if n.startswith(prefix)) == names
    router = f"model.layers.1.{ROUTER[family]}"
    assert stored[f"{router}.weight"].dtype == torch.float32
    config = json.loads((directory / "config.json").read_text())
    if layers:
        ignored = config["quantization_config"]["ignore"]
        assert router in ignored and "lm_head" in ignored
        assert f"model.layers.1.{EXPERT[family]}" not in ignored
        is_whole = len(layers) == 2 * len(MODELS[family].linears)
        assert ("model.layers.0.self_attn.q_proj" in ignored) != is_whole


def changed(directory, tmp_path, change):
    copy = shutil.copytree(directory, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, copy / "model.safetensors")
    return copy


def test_a_flipped_bit_and_swapped_experts_are_named(case, tmp_path):
    family, _, checkpoint, directory, names = case
    prefix = f"model.layers.1.{EXPERT[family]}."
    for number, name in enumerate(
        [*(prefix + n for n in names), f"model.layers.1.{ROUTER[family]}.weight"]
    ):

        def flip(tensors, name=name):
            bits = tensors[name].view(-1).view(torch.uint8)
            bits[bits.numel() // 2 & ~7] ^= 1

        copy = changed(directory, tmp_path / str(number), flip)
        problems = verify_export(copy, reference=checkpoint).problems
        assert any(name in problem for problem in problems), (name, problems)

    def swap(tensors):
        for name in names:
            one, other = (
                prefix + name,
                prefix.replace(".1.", ".2.").replace("layers.2", "layers.1") + name,
            )
            tensors[one], tensors[other] = tensors[other], tensors[one]

    problems = verify_export(
        changed(directory, tmp_path / "swap", swap), reference=checkpoint
    ).problems
    assert any(prefix in problem for problem in problems)


def test_another_number_of_experts_for_a_token_is_noticed(case, tmp_path):
    _, _, checkpoint, directory, _ = case
    copy = shutil.copytree(directory, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["num_experts_per_tok"] = 1
    (copy / "config.json").write_text(json.dumps(config))
    problems = verify_export(copy, reference=checkpoint).problems
    assert any("num_experts_per_tok=1, but the checkpoint has" in p for p in problems)

"""Exported mixtures of experts: what servers read, what verify makes of it, and what it notices."""

import json
import shutil
import warnings
from dataclasses import replace

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
# Both with a layer whose MLP is dense, and shared experts.
QWEN2_MOE = replace(
    QWEN3_MOE, family="qwen2_moe", biases=("self_attention.linear_qkv",), dense_layers=(0,),
    shared_intermediate_size=128,
)  # fmt: skip
GLM4_MOE = replace(
    QWEN3_MOE, family="glm4_moe", num_experts=8, experts_per_token=2, expert_groups=4,
    normalizes_expert_weights=True, expert_weight_scale=1.5, shared_intermediate_size=128,
    dense_layers=(0,), rotary_fraction=0.5, router_aux_loss_coef=0.0,
)  # fmt: skip
MODELS = {
    "mixtral": MIXTRAL, "qwen3_moe": QWEN3_MOE, "qwen2_moe": QWEN2_MOE, "glm4_moe": GLM4_MOE
}  # fmt: skip
# The experts alone, or everything; names of what is stored of one linear.
CASES = [
    ("mixtral", "null", None, ["weight"]),
    ("mixtral", "int4-experts", None, ["weight_packed", "weight_scale", "weight_shape"]),
    ("qwen3_moe", "int8_pc_pt", None, ["weight", "weight_scale"]),
    ("qwen3_moe", "fp8-experts", "modelopt", ["input_scale", "weight", "weight_scale"]),
    ("qwen2_moe", "int4-experts", None, ["weight_packed", "weight_scale", "weight_shape"]),
    ("qwen2_moe", "fp8", "modelopt", ["input_scale", "weight", "weight_scale"]),
    ("glm4_moe", "null", None, ["weight"]),
    ("glm4_moe", "int8_pc_pt", None, ["weight", "weight_scale"]),
    (
        "mixtral",
        "nvfp4-experts",
        "modelopt",
        ["input_scale", "weight", "weight_scale", "weight_scale_2"],
    ),
]
EXPERT = {name: "mlp.experts.1.gate_proj" for name in MODELS} | {
    "mixtral": "block_sparse_moe.experts.1.w1"
}
ROUTER = {name: "mlp.gate" for name in MODELS} | {"mixtral": "block_sparse_moe.gate"}
# Tensors beside experts and routers.
BESIDE = {
    "qwen2_moe": ["mlp.shared_expert_gate.weight", "mlp.shared_expert.up_proj"],
    "glm4_moe": ["mlp.gate.e_score_correction_bias", "mlp.shared_experts.down_proj"],
}


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
        key, lead = model.place(row.key, int(index))
        weight = state[key][(*lead, *row.stored_at)].view(row.shape(model))
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
        model = MODELS[family]
        is_whole = len(layers) == sum(len(model.linears_of(n)) for n in range(model.num_layers))
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
    stored = load_file(directory / "model.safetensors")
    beside = [
        n for b in BESIDE.get(family, []) for n in stored if n.startswith(f"model.layers.1.{b}")
    ]
    assert len(beside) >= len(BESIDE.get(family, []))
    router = f"model.layers.1.{ROUTER[family]}.weight"
    for number, name in enumerate([*(prefix + n for n in names), router, *beside]):

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


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("glm4_moe", {"routed_scaling_factor": 1.0}, "scale of experts' weights=1.0"),
        ("glm4_moe", {"n_group": 8}, "n_group=8, but the checkpoint has 4"),
        ("glm4_moe", {"n_group": 3}, "3 groups of 8 experts"),
        ("glm4_moe", {"first_k_dense_replace": 2}, "first_k_dense_replace=2, expected fewer"),
        ("glm4_moe", {"first_k_dense_replace": 0}, "is missing"),
        ("glm4_moe", {"n_shared_experts": 1}, "expected"),
        ("glm4_moe", {"norm_topk_prob": False}, "norm_topk_prob=False, expected one of"),
        ("glm4_moe", {"use_qk_norm": False}, "is not expected"),
        ("qwen2_moe", {"norm_topk_prob": True}, "add up to one: True, trained otherwise"),
        ("qwen2_moe", {"mlp_only_layers": [7]}, "expected a list of layers"),
        ("qwen2_moe", {"qkv_bias": False}, "is not expected"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 0}, "expected a positive integer"),
    ],
)
def test_a_config_that_says_something_else_of_experts_is_noticed(
    tmp_path, family, changes, message
):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", MODELS[family], {})
    export_hf(checkpoint, tmp_path / "out", dtype="float32")
    assert verify_export(tmp_path / "out", reference=checkpoint).problems == []  # control
    config = json.loads((tmp_path / "out" / "config.json").read_text()) | changes
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    problems = verify_export(tmp_path / "out", reference=checkpoint).problems
    assert any(message in problem for problem in problems), problems

"""Mixtures of experts for TensorRT-LLM: stacked tensors, what verify makes of them, what it notices."""

import json
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from mqat.checkpoints.reader import CheckpointReader
from mqat.errors import UserError
from mqat.export.export import export_hf, export_trtllm
from mqat.export.exporter import ExportOptions
from mqat.export.exporters import exporter
from mqat.models.structure import is_expert
from mqat.verify.verify import open_export, verify_export
from tests.unit.export.checkpoints import MIXTRAL, QWEN3_MOE, all_layers, write_checkpoint

TOKENS = torch.randint(0, 301, (2, 24), generator=torch.Generator().manual_seed(1))
MODELS = {
    "mixtral": replace(MIXTRAL, intermediate_size=256, expert_intermediate_size=256),
    "qwen3_moe": replace(QWEN3_MOE, expert_intermediate_size=128),
}
CASES = [
    (family, layers, layout)
    for family in MODELS
    for layers, layout in (
        ("null", (1, 1)),
        ("int4", (2, 1)),
        ("int4-experts", (1, 2)),
        ("fp8", (2, 1)),
    )
]


def layers_of(algorithm, model):
    name, _, which = algorithm.partition("-")
    layers = all_layers(name, model, group_size=64)
    return {n: scheme for n, scheme in layers.items() if not which or is_expert(n)}


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def case(request, tmp_path_factory):
    """(model, algorithm, checkpoint, directory, (tp, pp)); shared, so never changed."""
    family, algorithm, (tp, pp) = request.param
    root, model = tmp_path_factory.mktemp("moe"), MODELS[family]
    checkpoint = write_checkpoint(root / "checkpoint", model, layers_of(algorithm, model), cuts=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one input scale a layer
        export_trtllm(
            checkpoint, root / "out", tensor_parallel=tp, pipeline_parallel=pp, dtype="float32"
        )
    return model, algorithm, checkpoint, root / "out", (tp, pp)


def test_a_clean_directory_passes_and_computes_what_the_hugging_face_one_does(case, tmp_path):
    model, algorithm, checkpoint, directory, _ = case
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export_hf(checkpoint, tmp_path / "hf", dtype="float32")
    expected = open_export(tmp_path / "hf").logits(TOKENS)
    report = verify_export(
        directory, reference=checkpoint, tokens=TOKENS, reference_logits=expected
    )
    assert report.problems == [] and report.compared_with_checkpoint
    if algorithm == "fp8":  # whose experts share the largest scale of inputs
        assert 1e-4 < report.max_abs_difference < 1 and report.noise == 0.1
    else:
        assert report.max_abs_difference < 1e-4
    config = json.loads((directory / "config.json").read_text())
    assert config["hidden_act"] == "swiglu" and config["mapping"].keys() == {
        "world_size", "tp_size", "pp_size",
    }  # fmt: skip
    assert config["moe"] == {
        "num_experts": model.num_experts, "top_k": model.experts_per_token,
        "normalization_mode": int(model.normalizes_expert_weights),
    }  # fmt: skip
    if model.family == "qwen3_moe":
        assert config["moe_intermediate_size"] == model.expert_intermediate_size
    excluded = config["quantization"].get("exclude_modules", [])
    assert ("transformer.layers.0.attention.qkv" in excluded) == (algorithm == "int4-experts")


def test_experts_are_stacked_up_above_gate_and_cut_over_ranks(case):
    model, algorithm, checkpoint, directory, (tp, _) = case
    reader = CheckpointReader(checkpoint)
    experts, hidden, inner = (
        model.num_experts, model.hidden_size, model.expert_intermediate_size // tp
    )  # fmt: skip
    prefix = "decoder.layers.mlp.experts.experts"
    fc1, fc2 = (reader.read(f"{prefix}.linear_fc{n}.weight")[0] for n in (1, 2))
    gate, up = fc1.chunk(2, dim=1)
    for rank in range(tp):
        stored = load_file(directory / f"rank{rank}.safetensors")
        layer = {n.removeprefix("transformer.layers.0.mlp."): t for n, t in stored.items()}
        router = reader.read("decoder.layers.mlp.router.weight")[0]
        assert torch.equal(layer["router.weight"], router.float())
        if algorithm == "null":
            rows = slice(rank * inner, (rank + 1) * inner)
            assert torch.equal(layer["fc.weight"], torch.cat([up[:, rows], gate[:, rows]], dim=1))
            assert torch.equal(layer["proj.weight"], fc2[:, :, rows])
            continue
        if algorithm == "fp8":
            for name, kind in (("fc", "linear_fc1"), ("proj", "linear_fc2")):
                frozen = {
                    operand: torch.stack([
                        reader.frozen(f"decoder.layers.0.mlp.experts.{e}.{kind}", operand, "scale")
                        for e in range(experts)
                    ])
                    for operand in ("weight", "input")
                }  # fmt: skip
                assert layer[f"{name}.weight"].dtype == torch.float8_e4m3fn
                assert torch.equal(layer[f"{name}.weights_scaling_factor"], frozen["weight"])
                shared = layer[f"{name}.activation_scaling_factor"]
                assert shared.shape == (1,) and torch.equal(shared, frozen["input"].amax(dim=0))
            continue
        for name, out, width in (("fc", 2 * inner, hidden), ("proj", hidden, inner)):
            assert layer[f"{name}.weight"].shape == (experts, out // 2, width)
            assert layer[f"{name}.weight"].dtype == torch.int8
            assert layer[f"{name}.weights_scaling_factor"].shape == (experts, out, width // 64)
            assert layer[f"{name}.prequant_scaling_factor"].shape == (width,)


def changed(directory, tmp_path, change):
    copy = shutil.copytree(directory, tmp_path / "copy")
    tensors = load_file(copy / "rank0.safetensors")
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, copy / "rank0.safetensors")
    return copy


def test_flipped_bits_and_swapped_slices_are_named(case, tmp_path):
    _, _, checkpoint, directory, _ = case
    stored = load_file(directory / "rank0.safetensors")
    prefix = "transformer.layers.0.mlp."
    names = [n for n in stored if n.startswith(prefix) and "prequant" not in n]
    assert f"{prefix}router.weight" in names

    def swapped(halves):
        def swap(tensors):
            weight = tensors[f"{prefix}fc.weight"]
            if halves:
                weight.copy_(torch.cat(weight.chunk(2, dim=1)[::-1], dim=1))
            else:
                weight[[0, 1]] = weight[[1, 0]]

        return swap

    for number, name in enumerate(names):

        def flip(tensors, name=name):
            bits = tensors[name].view(-1).view(torch.uint8)
            bits[(bits.numel() - 1) & ~7] ^= 1

        copy = changed(directory, tmp_path / str(number), flip)
        problems = verify_export(copy, reference=checkpoint).problems
        assert any(name in problem for problem in problems), (name, problems)
    for halves in (True, False):
        copy = changed(directory, tmp_path / str(halves), swapped(halves))
        problems = verify_export(copy, reference=checkpoint).problems
        assert any(f"{prefix}fc.weight" in problem for problem in problems), halves


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 1}, "moe.top_k=1, but the checkpoint has"),
        ({"normalization_mode": 2}, "moe.normalization_mode=2, expected one of"),
        ({"experts_per_node": 1}, "unknown key 'moe.experts_per_node'"),
    ],
)
def test_another_mixture_in_the_configuration_is_noticed(case, tmp_path, change, message):
    _, _, checkpoint, directory, _ = case
    copy = shutil.copytree(directory, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["moe"] |= change
    (copy / "config.json").write_text(json.dumps(config))
    problems = verify_export(copy, reference=checkpoint).problems
    assert any(message in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("model", "layers", "options", "message"),
    [
        (MIXTRAL, "int8", {}, r"experts\.0\.linear_fc1: int8 .*W8A8_SQ_PER_CHANNEL.*W4A16_AWQ"),
        (MIXTRAL, "nvfp4", {}, "NVFP4 in TensorRT-LLM, which is not written for experts"),
        (MIXTRAL, "fp8_pc_pt", {}, "FP8_PER_CHANNEL_PER_TOKEN in TensorRT-LLM"),
        (MIXTRAL, "int4", {"tensor_parallel": 2}, r"in_features=192 is not a multiple of 128"),
        (QWEN3_MOE, "null", {"tensor_parallel": 3}, "does not fit .*expert_intermediate_size=64"),
    ],
)
def test_what_its_mixtures_cannot_take_is_refused_by_name(model, layers, options, message):
    schemes = layers_of(layers, model)
    with pytest.raises(UserError, match=message):
        exporter("trtllm").check(model, schemes, ExportOptions(**options))


def test_experts_quantized_otherwise_than_the_rest_are_refused():
    model = MODELS["mixtral"]
    schemes = layers_of("int4", model)
    dense = {n: s for n, s in schemes.items() if not is_expert(n)}
    target = exporter("trtllm")
    target.check(model, schemes, ExportOptions())  # control
    with pytest.raises(UserError, match=r"experts\.0\.linear_fc1 is not quantized while other"):
        target.check(model, dense, ExportOptions())
    fp8 = {n: s for n, s in layers_of("fp8", model).items() if n in dense}
    with pytest.raises(UserError, match="quantized in several ways"):
        target.check(model, schemes | fp8, ExportOptions())


def test_one_input_scale_for_all_experts_is_said():
    target = exporter("trtllm")
    for algorithm, is_said in (("fp8", True), ("int4", False)):
        told = target.warning(layers_of(algorithm, MODELS["mixtral"]))
        assert (told is not None and "the largest is written" in told) == is_said

"""A linear's form follows from its operands, never from a name; without a form it is refused."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mqat.export.export import export_hf, export_trtllm
from mqat.export.exporter import ExportOptions
from mqat.export.exporters import EXPORTERS, exporter
from mqat.models.decoder import FAMILIES
from mqat.models.families.llama import LLAMA
from mqat.models.structure import DENSE_NORMS, Norm, stacked_key
from mqat.quant.algorithm import ALGORITHMS, named_scheme
from mqat.quant.formats import INT8
from mqat.quant.granularity import PerTensor
from mqat.quant.scheme import LinearScheme, TensorScheme
from mqat.specs.policy import Policy
from tests.unit.export.checkpoints import TINY, UNTIED, all_layers, tensors_of, write_checkpoint
from tests.unit.export.test_export import contents
from tests.unit.verify.test_reader import TOKENS, relative, transformers_logits

pytestmark = pytest.mark.filterwarnings("ignore:W8A16 checkpoints hold unquantized weights")
TARGETS = ("trtllm", "compressed-tensors", "modelopt")
SERVED = {
    "trtllm": ("int8", "int8_wo", "int4_awq", "w4a8_awq", "fp8", "fp8_pc_pt", "nvfp4"),
    "compressed-tensors": (
        "int8", "int8_pc_pt", "int8_wo", "int4", "w_int4_sym", "w_uint4_asym", "int4_w_int8_a",
        "8da4w", "fp8", "fp8_pc_pt", "nvfp4",
    ),
    "modelopt": ("int4", "w4a8_awq", "fp8", "fp8_pc_pt", "nvfp4"),
}  # fmt: skip
FC2 = "decoder.layers.0.mlp.linear_fc2"


def check(layers, target, model=TINY, **options):
    made = exporter(target) if target == "trtllm" else exporter("hf", target)
    made.check(model, layers, ExportOptions(**options))


def export(checkpoint, out, target, **options):
    if target == "trtllm":
        export_trtllm(checkpoint, out, tensor_parallel=2, allow_requantization=True, **options)
    else:
        export_hf(checkpoint, out, style=target, **options)
    return contents(out)


def renamed(layers, name):
    return {key: replace(scheme, name=name) for key, scheme in layers.items()}


def without_inputs(algorithm, pattern="*.linear_fc2.input", **settings):
    return Policy(algorithm, disabled=[pattern], **settings).schemes(UNTIED)


@pytest.mark.parametrize(
    ("target", "algorithm"), [(t, algorithm) for t, found in SERVED.items() for algorithm in found]
)
def test_operands_that_a_rule_spells_out_are_exported_as_the_named_algorithm(
    target, algorithm, tiny, tmp_path
):
    layers = renamed(all_layers(algorithm), "custom")
    custom = write_checkpoint(tmp_path / "custom", TINY, layers)
    assert export(custom, tmp_path / "a", target) == export(tiny(algorithm), tmp_path / "b", target)


@pytest.mark.parametrize("target", ["trtllm", "compressed-tensors"])
def test_a_name_that_lies_changes_nothing(target, tiny, tmp_path):
    lying = write_checkpoint(tmp_path / "lying", TINY, renamed(all_layers("int8"), "fp8"))
    found = export(lying, tmp_path / "out", target)
    assert found == export(tiny("int8"), tmp_path / "int8", target)
    assert found != export(tiny("fp8"), tmp_path / "fp8", target)  # control


def test_a_mixture_of_names_with_the_same_operands_is_none(tmp_path):
    layers = all_layers("int4") | {FC2: replace(all_layers("int4")[FC2], name="int4_awq")}
    written = export(write_checkpoint(tmp_path / "c", TINY, layers), tmp_path / "out", "modelopt")
    assert json.loads(written["hf_quant_config.json"])["quantization"]["quant_algo"] == "W4A16_AWQ"


@pytest.mark.parametrize("algorithm", ["int8", "int4_w_int8_a", "8da4w", "fp8", "fp8_pc_pt"])
def test_weights_without_inputs_load_beside_the_others_in_transformers(algorithm, tmp_path):
    pytest.importorskip("compressed_tensors", reason="optional: pip install 'mqat[hf]'")
    layers = without_inputs(algorithm)
    checkpoint = write_checkpoint(tmp_path / "c", UNTIED, layers)
    export(checkpoint, tmp_path / "out", "compressed-tensors", dtype="float32")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    both, weights = config["config_groups"].values()
    assert config["format"] == "mixed-precision" and both["format"] != weights["format"]
    assert weights["weights"] == both["weights"] and weights["input_activations"] is None
    assert weights["targets"] == [f"model.layers.{i}.mlp.down_proj" for i in range(4)]
    assert len(both["targets"]) == 4 * 6
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        found = served(TOKENS).logits
    assert torch.equal(found, transformers_logits(UNTIED, layers, TOKENS))
    # Control: inputs of the same linears make another model.
    assert relative(found, transformers_logits(UNTIED, all_layers(algorithm), TOKENS)) > 1e-4


def test_fp4_weights_without_inputs_have_a_form_of_their_own(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "c", UNTIED, without_inputs("nvfp4"))
    export(checkpoint, tmp_path / "out", "compressed-tensors")
    names = load_file(tmp_path / "out" / "model.safetensors")
    suffixes = {n.rpartition(".")[2] for n in names if n.startswith("model.layers.0.mlp.down_proj")}
    assert suffixes == {"weight_packed", "weight_scale", "weight_global_scale"}


def test_int4_weights_mix_with_and_without_inputs_in_an_engine(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "c", UNTIED, without_inputs("w4a8_awq"))
    written = export(checkpoint, tmp_path / "out", "trtllm")
    found = json.loads(written["quant_cfg.json"])["quantized_layers"]
    assert found["transformer.layers.1.mlp.proj"]["quant_algo"] == "W4A16_AWQ"
    assert found["transformer.layers.1.mlp.fc"]["quant_algo"] == "W4A8_AWQ"
    names = load_file(tmp_path / "out" / "rank1.safetensors")
    assert "transformer.layers.1.mlp.fc.activation_scaling_factor" in names
    assert "transformer.layers.1.mlp.proj.activation_scaling_factor" not in names


@pytest.mark.parametrize(
    ("algorithm", "target", "message"),
    [
        ("int8", "trtllm", r"linear_fc2: custom \(weight int8 per channel, input unquantized\) .*"
         r"in a mixture with W8A8_SQ_PER_CHANNEL.*quantizes them again at load time"),
        ("fp8", "trtllm", r"linear_fc2: custom \(weight fp8_e4m3 per tensor, input unquantized\) .*"
         "FP8, needs a quantized input.*only exact weight-only form is INT4 groups"),
        ("nvfp4", "trtllm", "NVFP4, needs a quantized input"),
        ("fp8", "modelopt", "FP8, needs a quantized input.*Use style=compressed-tensors"),
        ("w4a8_awq", "modelopt", r"linear_qkv: w4a8_awq .* beside .*linear_fc2: custom .*"
         "has no mixtures"),
    ],
)  # fmt: skip
def test_weights_without_inputs_are_refused_where_no_form_can_mix(algorithm, target, message):
    with pytest.raises(ValueError, match=message):
        check(without_inputs(algorithm), target, UNTIED, allow_requantization=target == "trtllm")


def test_weights_alone_are_served_whole_with_consent_to_a_second_rounding():
    layers = without_inputs("int8", "*.input")
    with pytest.raises(ValueError, match=r"export\.allow_requantization=true"):
        check(layers, "trtllm")
    check(layers, "trtllm", allow_requantization=True)
    check(layers, "compressed-tensors")


@pytest.mark.parametrize("target", TARGETS)
def test_inputs_without_weights_and_outputs_have_no_form(target):
    scheme = named_scheme("fp8")
    for wrong, message in (
        (
            LinearScheme("fp8", None, scheme.input),
            r"(FP8|float-quantized), needs a quantized weight",
        ),
        (
            replace(scheme, output=scheme.input),
            r"(FP8|float-quantized), needs an unquantized output",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            check(all_layers("fp8") | {FC2: wrong}, target)


def test_fp8_steps_are_of_bfloat16_only_where_a_server_rounds_them():
    scheme = named_scheme("fp8")
    exact = replace(
        scheme,
        weight=replace(scheme.weight, scale_dtype=torch.float32),
        input=replace(scheme.input, scale_dtype=torch.float32),
    )
    for target in set(TARGETS) - {"trtllm"}:
        check(dict.fromkeys(all_layers("fp8"), exact), target)
    with pytest.raises(ValueError, match=r"FP8, needs weight scale bfloat16"):
        check({FC2: exact}, "trtllm")


def test_inputs_that_kernels_would_saturate_elsewhere_are_refused():
    scheme = replace(named_scheme("int8"), input=TensorScheme(INT8, PerTensor()))
    with pytest.raises(ValueError, match="needs input format int8_full"):
        check({FC2: scheme}, "trtllm")


@pytest.mark.parametrize("target", TARGETS)
def test_every_algorithm_has_a_form_or_is_refused_with_its_operands(target):
    for algorithm in ALGORITHMS:
        layers = all_layers(algorithm, group_size=128)
        try:
            check(layers, target, allow_requantization=target == "trtllm")
        except ValueError as error:
            assert f"linear_qkv: {algorithm} (weight " in str(error)
            assert algorithm not in SERVED[target]


def test_norms_of_heads_are_exported_because_the_table_lists_them(monkeypatch, tmp_path):
    names = {"q": "self_attention.q_layernorm", "k": "self_attention.k_layernorm"}
    norms = [
        Norm(name, "head", stacked_key(name, "weight"), f"self_attn.{x}_norm", f"attn_{x}_norm",
             f"attention.{x}_layernorm")
        for x, name in names.items()
    ]  # fmt: skip
    family = replace(LLAMA, name="normed", norms=(*DENSE_NORMS, *norms))
    monkeypatch.setitem(FAMILIES, "normed", family)
    model = replace(UNTIED, family="normed")
    layers = all_layers("int8", model)
    checkpoint = write_checkpoint(tmp_path / "c", model, layers)
    written = export(checkpoint, tmp_path / "trtllm", "trtllm")
    assert json.loads(written["config.json"])["qk_layernorm"] is True
    export(checkpoint, tmp_path / "hf", "compressed-tensors", dtype="float32")
    served = load_file(tmp_path / "hf" / "model.safetensors")
    state = tensors_of(model, layers)
    for x, name in names.items():
        expected = state[stacked_key(name, "weight")][2]
        assert torch.equal(served[f"model.layers.2.self_attn.{x}_norm.weight"], expected)
        for rank in range(2):
            file = load_file(tmp_path / "trtllm" / f"rank{rank}.safetensors")
            found = file[f"transformer.layers.2.attention.{x}_layernorm.weight"]
            assert torch.equal(found, expected.bfloat16())


def test_one_list_names_every_exporter():
    assert [(e.format, e.style) for e in EXPORTERS] == [
        ("trtllm", None), ("hf", "compressed-tensors"), ("hf", "modelopt"), ("nemo", None),
        ("peft", None), ("gguf", None),
    ]  # fmt: skip
    assert exporter("hf") is exporter("hf", "compressed-tensors")
    with pytest.raises(ValueError, match=r"export\.style='modelopt': trtllm has none"):
        exporter("trtllm", "modelopt")
    with pytest.raises(ValueError, match=r"export\.format='onnx': must be one of trtllm, hf"):
        exporter("onnx")


@pytest.mark.parametrize(
    "options", [{"tensor_parallel": 2}, {"pipeline_parallel": 2}, {"archive": "tar"}]
)
def test_a_hugging_face_directory_has_no_inference_layout(options):
    with pytest.raises(ValueError, match="servers split the weights themselves"):
        check({}, "compressed-tensors", **options)


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        (
            "compressed-tensors",
            {"allow_requantization": True},
            "leave out export.allow_requantization",
        ),
        ("trtllm", {"max_shard_bytes": 10**9}, "one file; leave out --max-shard-gb"),
    ],
)
def test_options_of_the_other_form_are_refused_by_name(target, options, message):
    check({}, target)  # control
    with pytest.raises(ValueError, match=message):
        check({}, target, **options)

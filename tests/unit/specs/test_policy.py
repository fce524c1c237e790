from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mqat.config import load_config
from mqat.models.decoder import DecoderConfig
from mqat.models.schemes import kv_cache_schemes, table_schemes
from mqat.models.structure import DENSE_LINEARS
from mqat.plan.run import describe, make_plan
from mqat.quant.algorithm import Recipe, named_algorithm, named_scheme
from mqat.quant.formats import FORMATS, FP8_E4M3, INT4, INT8_MIN128
from mqat.quant.granularity import PerBlock, PerGroup, PerTensor, PerToken
from mqat.quant.kv_cache import kv_cache_scheme
from mqat.quant.scheme import LinearScheme, TensorScheme
from mqat.specs.policy import Policy, Rule, tensor_scheme

TINY = Path(__file__).parents[3] / "conf" / "qat_tiny.yaml"
LINEARS = tuple(linear.name for linear in DENSE_LINEARS)

MODEL = DecoderConfig(
    vocab_size=301, hidden_size=128, intermediate_size=256, num_layers=2,
    num_attention_heads=4, num_query_groups=2, head_dim=32, tie_word_embeddings=True,
)  # fmt: skip
YAML = """
model:
  architecture: {hidden_size: 128, intermediate_size: 256, num_layers: 2, num_query_groups: 4}
  data: {packaged: python_docs}
quantization:
  algorithm: int8
  rules:
    - pattern: "decoder.layers.0.*"
      algorithm: null
    - pattern: "*.linear_fc2"
      weight: {format: int4, granularity: "group:32", scale: bfloat16}
      input: {format: fp8_e4m3, granularity: token, dynamic: true}
      output: {format: int8_full, granularity: tensor}
export: {format: null}
"""


def plan(tmp_path, text: str):
    (tmp_path / "run.yaml").write_text(text)
    return make_plan(load_config(tmp_path / "run.yaml"), world_size=1)


def test_the_first_matching_rule_wins_and_the_default_takes_the_rest():
    rules = (Rule("*.0.mlp.*", "null"), Rule("*.mlp.*", "8da4w"), Rule("*.linear_fc2", "fp8"))
    layers = Policy("int8", rules=rules).schemes(MODEL)
    assert len(layers) == 2 * len(LINEARS) - 2
    assert layers["decoder.layers.1.mlp.linear_fc2"] == named_scheme("8da4w")
    assert layers["decoder.layers.0.self_attention.linear_qkv"] == named_scheme("int8")


@pytest.mark.parametrize(("size", "expected"), [(None, {128, 256}), (32, {32})])
def test_without_a_group_size_every_algorithm_has_its_own(size, expected):
    layers = Policy("int4", size, (Rule("*.linear_fc2", "8da4w"),)).schemes(MODEL)
    assert {scheme.weight.granularity.size for scheme in layers.values()} == expected


def test_a_rule_in_yaml_composes_weight_input_and_output(tmp_path):
    layers = plan(tmp_path, YAML).layers
    assert len(layers) == 4
    assert layers["decoder.layers.1.mlp.linear_fc2"] == LinearScheme(
        "custom",
        TensorScheme(INT4, PerGroup(32), torch.bfloat16),
        TensorScheme(FP8_E4M3, PerToken(), is_dynamic=True),
        TensorScheme(INT8_MIN128, PerTensor()),
    )
    assert layers["decoder.layers.1.mlp.linear_fc1"] == named_scheme("int8")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("granularity: token", "granularities: token",
         r"unknown key 'quantization.rules\[1\].input.granularities'; did you mean .*granularity"),
        ("weight:", "wieght:", r"'quantization.rules\[1\].wieght'; did you mean 'weight'"),
        ("format: int4", "format: int44",
         r"quantization.rules\[1\].weight.format='int44' is unknown; did you mean 'int4'"),
        ("scale: bfloat16", "scale: bfloat61", r"weight.scale='bfloat61' is unknown; did you mean"),
        ("group:32", "groups:32", r"weight: granularity 'groups:32': expected 'tensor'"),
        ("dynamic: true", "dynamic: maybe", r"input\.dynamic: Value 'maybe'"),
        ("dynamic: true", "dynamic: false", r"rules\[1\].input: granularity 'token' is known only"),
        ("granularity: tensor", "granularity: 'group:32'", r"rules\[1\].output: static scales have"),
        ("format: int4, ", "", r"rules\[1\].weight.format is missing"),
        ('fc2"\n', 'fc2"\n      algorithm: int8\n', r"rules\[1\] has both algorithm='int8' and weight"),
        ("algorithm: null", "algorithm: nul", r"'nul' is unknown; did you mean 'null'"),
        ("algorithm: null", "algorithm: int8\n      recipe: {smoth: true}",
         r"'quantization.rules\[0\].recipe.smoth'; did you mean 'smoothquant'"),
        ("algorithm: null", "algorithm: int8\n      recipe: {rounding: gptk}",
         r"rules\[0\].recipe.rounding='gptk' is unknown; did you mean 'gptq'"),
        ("algorithm: null", "algorithm: null\n      recipe: {rounding: gptq}",
         r"rules\[0\] has a recipe, but quantizes nothing"),
        ("format: null", "format: trtllm", r"custom \(weight .* cannot be exported"),
    ],
)  # fmt: skip
def test_mistakes_in_rules_name_key_value_and_the_nearest(tmp_path, old, new, message):
    assert old in YAML
    with pytest.raises(ValueError, match=message):
        plan(tmp_path, YAML.replace(old, new))


@pytest.mark.parametrize("algorithm", ["8da4w", "mxfp8", "nf4", "w_uint4_asym"])
def test_algorithms_that_the_export_format_lacks_are_refused_before_training(tmp_path, algorithm):
    text = YAML.split("  rules:")[0].replace("int8", algorithm)
    assert plan(tmp_path, text + "export: {format: null}").layers
    with pytest.raises(
        ValueError, match=rf"linear_qkv: {algorithm} \(weight .* cannot be exported"
    ):
        plan(tmp_path, text)


def test_one_key_quantizes_the_cache_of_every_layer(tmp_path):
    text = YAML.replace("algorithm: int8\n", "algorithm: int8\n  kv_cache: fp8\n", 1)
    made = plan(tmp_path, text)
    caches = kv_cache_schemes(made.layers)
    assert list(caches) == [f"decoder.layers.{i}.self_attention.core_attention" for i in range(2)]
    assert set(caches.values()) == {kv_cache_scheme("fp8")} and len(made.layers) == 4 + 2
    assert describe(made)["key/value cache"] == "fp8" and describe(made)["quantized linears"] == 4
    assert not kv_cache_schemes(plan(tmp_path, YAML).layers)


@pytest.mark.parametrize(
    ("keys", "export", "message"),
    [
        ("kv_cache: fp4", "null", "kv_cache='fp4' is not one of: null, int8, fp8"),
        ("kv_cashe: fp8", "null", "did you mean 'kv_cache'"),
        ("enable_kv_cache: true", "null", "did you mean 'kv_cache'"),
        ("kv_cache: int8", "hf", "kv_cache=int8 cannot be exported to compressed-tensors"),
        (
            "kv_cache: fp8, kv_cache_scales: separate",
            "trtllm",
            "cannot be exported to TensorRT-LLM",
        ),
    ],
)
def test_caches_that_do_not_exist_or_are_not_served_are_refused(tmp_path, keys, export, message):
    head = YAML.split("quantization:")[0]
    text = f"{head}quantization: {{algorithm: int8, {keys}}}\nexport: {{format: {export}}}\n"
    with pytest.raises(ValueError, match=message):
        plan(tmp_path, text)


UNTIED = replace(MODEL, tie_word_embeddings=False)
GROUPS = {"format": "int4", "granularity": "group:32"}
INT8_INPUT = {"format": "int8_full", "granularity": "tensor"}


def test_tables_are_quantized_only_by_their_names():
    everything = Policy("int8", rules=(Rule("*", "int4"),)).schemes(UNTIED)
    assert not table_schemes(everything)
    rules = (
        Rule("output_layer", operands={"weight": GROUPS, "input": INT8_INPUT}),
        Rule("embedding.word_embeddings", "int4"),
        Rule("output_layer", "int8"),  # the first rule wins
    )
    tables = table_schemes(Policy("int8", 32, rules).schemes(UNTIED))
    assert tables["output_layer"].input is not None and tables["output_layer"].name == "custom"
    assert tables["embedding.word_embeddings"] == named_scheme("int4", group_size=32)
    off = (Rule("output_layer", "null"), Rule("output_layer", "int4"))
    assert not table_schemes(Policy("int8", rules=off).schemes(UNTIED))


@pytest.mark.parametrize(
    ("model", "rule", "message"),
    [
        (MODEL, Rule("output_layer", "int4"), "output_layer cannot be quantized.* are one weight"),
        (MODEL, Rule("embedding.word_embeddings", "int4"), "are one weight"),
        (UNTIED, Rule("embedding.word_embeddings", "int8"), "has no input to quantize, only weight"),
        (UNTIED, Rule("output_layer", operands={"weight": GROUPS, "output": INT8_INPUT}),
         "output_layer has no output to quantize, only weight and input"),
        (UNTIED, Rule("output_layer", "fp8"), "granularity 'tensor'; rows of the vocabulary"),
        (UNTIED, Rule("output_layer", operands={"input": INT8_INPUT}), "granularity None; rows"),
        (UNTIED, Rule("output_layer", "int4_awq"), "output_layer cannot go through a recipe"),
        (UNTIED, Rule("output_layer", "int4", recipe={"rounding": "gptq"}), "go through a recipe"),
        (UNTIED, Rule("output_layers", "int4"), "only by a rule that says exactly"),
        (UNTIED, Rule("output*", "int4"), "only by a rule that says exactly"),
    ],
)  # fmt: skip
def test_tables_that_cannot_be_quantized_are_refused(model, rule, message):
    with pytest.raises(ValueError, match=message):
        Policy("int8", rules=(rule,)).schemes(model)


def test_quantized_tables_are_not_exported(tmp_path):
    text = YAML.replace("num_query_groups: 4", "num_query_groups: 4, tie_word_embeddings: false")
    head = "output_layer\n      algorithm: int4"
    text = text.replace('"decoder.layers.0.*"\n      algorithm: null', head)
    text = text.split('    - pattern: "*.linear_fc2"')[0]
    assert plan(tmp_path, text + "export: {format: null}").layers["output_layer"]
    with pytest.raises(ValueError, match="output_layer is quantized, which no export format"):
        plan(tmp_path, text)


def test_every_format_can_be_composed_with_some_granularity():
    for name, fmt in FORMATS.items():
        settings = {"format": name, "granularity": "block:128", "asymmetric": fmt.is_unsigned}
        assert tensor_scheme(settings, "rule").granularity == PerBlock(128)
    mx = tensor_scheme({"format": "int8", "granularity": "group:32", "scale": "e8m0"}, "rule")
    assert mx.scale_dtype == torch.float8_e8m0fnu


def test_unknown_keys_in_settings_made_by_hand_are_refused():
    with pytest.raises(
        ValueError, match=r"unknown key 'rule\.symetric'; did you mean 'asymmetric'"
    ):
        tensor_scheme({"symetric": True}, "rule")
    with pytest.raises(ValueError, match=r"rules\[0\]\.wait'; did you mean 'weight'"):
        Policy("int8", rules=(Rule("*", operands={"wait": {}}),)).schemes(MODEL)


def test_disabled_operands_are_left_out_and_the_rest_keeps_its_scheme():
    policy = Policy("int8", disabled=["*.linear_fc2.input", "decoder.layers.0.mlp.linear_fc1.*"])
    layers, whole = policy.schemes(MODEL), Policy("int8").schemes(MODEL)
    weight_only = layers["decoder.layers.1.mlp.linear_fc2"]
    assert weight_only.input is None and weight_only.weight == named_scheme("int8").weight
    assert whole.keys() - layers.keys() == {"decoder.layers.0.mlp.linear_fc1"}
    assert layers["decoder.layers.1.mlp.linear_fc1"] == named_scheme("int8")
    with pytest.raises(ValueError, match=r"pattern '\*\.linear_fc3\.\*' matches nothing that is"):
        Policy("int8", disabled=["*.linear_fc3.*"]).schemes(MODEL)


def recipes(policy: Policy) -> dict[str, Recipe]:
    """Of the linears of the second layer, by their name in it."""
    found = policy.resolve(MODEL)
    return {name: found[f"decoder.layers.1.{name}"].recipe for name in LINEARS}


def test_a_rule_with_a_named_recipe_has_that_recipe_and_the_rest_the_default_s():
    awq = named_algorithm("int4_awq").recipe
    assert awq.smoothquant and awq.weight_calibrator == "awq"
    *others, fc2 = recipes(Policy("int8", rules=(Rule("*.linear_fc2", "int4_awq"),))).values()
    assert fc2 == awq and set(others) == {Recipe()}
    *others, fc2 = recipes(Policy("int4_awq", rules=(Rule("*.linear_fc2", "int8"),))).values()
    assert fc2 == Recipe() and set(others) == {awq}


def test_keys_of_the_whole_run_reach_all_but_rules_with_a_named_recipe():
    keys = {"rounding": "gptq", "weight_calibrator": "mse"}
    rules = (
        Rule("*.linear_fc1", "int4_awq"),
        Rule("*.linear_fc2", operands={"weight": GROUPS}),
        Rule("*.linear_proj", "int4", recipe={"weight_calibrator": "sawb"}),
    )
    qkv, proj, fc1, fc2 = recipes(Policy("int4_awq", rules=rules, recipe=keys)).values()
    awq = named_algorithm("int4_awq").recipe
    assert qkv == replace(awq, **keys) and fc1 == awq
    assert fc2 == Recipe(**keys) and proj == Recipe(weight_calibrator="sawb", rounding="gptq")


def test_a_configuration_s_recipe_keys_become_the_recipes_of_its_linears(tmp_path):
    text = YAML.replace("algorithm: int8\n", "algorithm: int8\n  smoothquant: true\n", 1)
    text = text.replace('fc2"\n', 'fc2"\n      recipe: {sq_alpha: null, rounding: gptq}\n')
    made = plan(tmp_path, text)
    assert made.recipes.keys() == made.layers.keys()
    assert made.recipes["decoder.layers.1.mlp.linear_fc1"] == Recipe(smoothquant=True)
    assert made.recipes["decoder.layers.1.mlp.linear_fc2"] == Recipe(
        smoothquant=True, sq_alpha=None, rounding="gptq"
    )
    awq = plan(tmp_path, YAML.split("  rules:")[0].replace("int8", "int4_awq")).recipes
    assert set(awq.values()) == {named_algorithm("int4_awq").recipe}


def test_a_recipe_key_that_equals_the_default_is_still_a_choice():
    def of(*keys):
        overrides = [f"quantization.{key}" for key in keys]
        return make_plan(load_config(TINY, [*overrides, "export.format=null"]), 8).recipes.values()

    keys = ("weight_calibrator=max", "smoothquant=false", "sq_alpha=0.8", "sq_grid=power_of_two")
    assert set(of("algorithm=int4_awq", "group_size=32", *keys)) == {Recipe()}
    assert set(of("algorithm=int8_sq", "smoothquant=false")) == {Recipe()}
    assert set(of("algorithm=int8_sq")) == {Recipe(smoothquant=True)}  # control: nothing chosen


BLOCKS = "rules=[{pattern: '*', weight: {format: fp8_e4m3, granularity: 'block:16'}}]"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["algorithm=fp8", "weight_calibrator=sawb"], "sawb has no coefficients for fp8_e4m3"),
        (["algorithm=int8", "weight_calibrator=four_over_six"], "two block scales of NVFP4"),
        ([BLOCKS, "rounding=gptq"], r"weights in squares \(block:16\)"),
    ],
)
def test_a_recipe_that_a_weight_cannot_go_through_is_refused_before_the_run(keys, message):
    overrides = ["export.format=null", *(f"quantization.{key}" for key in keys)]
    with pytest.raises(ValueError, match=r"decoder\.layers\.0\..*" + message):
        make_plan(load_config(TINY, overrides), 8)
    make_plan(load_config(TINY, overrides[:-1]), 8)  # control: without the recipe

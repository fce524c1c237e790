from dataclasses import replace

import pytest

from mqat.export.exporter import ExportOptions
from mqat.export.exporters import exporter
from mqat.export.trtllm import config
from mqat.quant.algorithm import named_scheme
from tests.unit.export.checkpoints import EXPORTABLE, TINY, all_layers

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
BUILT_IN = [
    "*lm_head",
    "*router",
    "*vocab_embedding",
    "*position_embedding",
    "*block_embedding",
    "*shared_expert_gate",
]


TRTLLM = exporter("trtllm")


def check_exportable(model, layers, *, tp, pp, allow_requantization=False):
    options = ExportOptions(tp, pp, allow_requantization=allow_requantization)
    TRTLLM.check(model, layers, options)


def check(algorithm, tp=1, pp=1, model=TINY):
    check_exportable(model, all_layers(algorithm, model), tp=tp, pp=pp, allow_requantization=True)


def config_json(model, layers, *, tp, pp, dtype):
    return config.config_json(model, layers, ExportOptions(tp, pp, dtype))


def test_config_json_of_a_llama3_model_in_fp8():
    model = replace(TINY, rope_theta=500000.0, rope_scaling=LLAMA3)
    found = config_json(model, all_layers("fp8"), tp=2, pp=2, dtype="float16")
    version = found.pop("producer")["version"]
    assert version[0].isdigit()
    assert found == {
        "architecture": "LlamaForCausalLM",
        "dtype": "float16",
        "logits_dtype": "float32",
        "vocab_size": 301,
        "max_position_embeddings": 128,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_size": 64,
        "hidden_act": "silu",
        "norm_epsilon": 1e-05,
        "qk_layernorm": False,
        "attn_bias": False,
        "mlp_bias": False,
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": 500000.0,
        "rotary_scaling": {
            "type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "use_parallel_embedding": True,
        "embedding_sharding_dim": 0,
        "share_embedding_table": False,
        "mapping": {"world_size": 4, "tp_size": 2, "pp_size": 2},
        "quantization": {
            "quant_algo": "FP8",
            "kv_cache_quant_algo": None,
            "exclude_modules": BUILT_IN,
        },
    }


def test_quantization_sections():
    sections = {
        algorithm: config_json(TINY, all_layers(algorithm), tp=1, pp=1, dtype="bfloat16")[
            "quantization"
        ]
        for algorithm in EXPORTABLE
    }
    assert sections["null"] == {"quant_algo": None, "kv_cache_quant_algo": None}
    assert sections["int8"]["quant_algo"] == "W8A8_SQ_PER_CHANNEL"
    assert sections["int8_wo"]["quant_algo"] == "W8A16"
    assert sections["int4"] == {
        "quant_algo": "W4A16_AWQ",
        "kv_cache_quant_algo": None,
        "exclude_modules": BUILT_IN,
        "group_size": 64,
        "has_zero_point": False,
        "pre_quant_scale": True,
    }


def test_every_exportable_algorithm_fits_the_tiny_model():
    for algorithm in EXPORTABLE:
        for tp in (1, 2, 4):
            check(algorithm, tp=tp, pp=2)


def test_an_algorithm_without_a_form_is_refused_with_what_to_use_instead():
    with pytest.raises(
        ValueError,
        match=r"linear_qkv: int4_w_int8_a \(weight int4 .*\) cannot be exported.*use int8 .* or int4",
    ):
        check("int4_w_int8_a")


def test_weight_only_int8_needs_consent_because_the_loader_rounds_again():
    with pytest.raises(ValueError, match=r"int8_wo .* cannot be exported .* exactly.*format=hf"):
        check_exportable(TINY, all_layers("int8_wo"), tp=1, pp=1)
    check_exportable(TINY, all_layers("int8_wo"), tp=1, pp=1, allow_requantization=True)


def mixture():
    """Layer 0 keeps its MLP in FP8, layer 1 its attention unquantized, all else in INT4."""
    layers = all_layers("int4")
    for linear in ("mlp.linear_fc1", "mlp.linear_fc2"):
        layers[f"decoder.layers.0.{linear}"] = named_scheme("fp8")
    del layers["decoder.layers.1.self_attention.linear_qkv"]
    layers["decoder.layers.3.mlp.linear_fc2"] = named_scheme("int4", group_size=128)
    return layers


def test_several_algorithms_or_group_sizes_become_mixed_precision():
    found = config_json(TINY, mixture(), tp=1, pp=1, dtype="bfloat16")
    assert found["quantization"] == {
        "quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": None
    }  # fmt: skip
    mixed = config.quant_cfg_json(TINY, mixture(), pp=1)
    assert {key: value for key, value in mixed.items() if key != "quantized_layers"} == {
        "quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": None
    }  # fmt: skip
    layers = mixed["quantized_layers"]
    assert len(layers) == 4 * 5 - 1 and "transformer.layers.1.attention.qkv" not in layers
    assert layers["transformer.layers.0.mlp.fc"] == {"quant_algo": "FP8"}
    awq = {"quant_algo": "W4A16_AWQ", "has_zero_point": False, "pre_quant_scale": True}
    assert layers["transformer.layers.2.mlp.gate"] == awq | {"group_size": 64}
    assert layers["transformer.layers.3.mlp.proj"] == awq | {"group_size": 128}
    assert config.quant_cfg_json(TINY, all_layers("int4"), pp=1) is None


def test_mixtures_need_the_same_pattern_in_every_stage():
    check_exportable(TINY, mixture(), tp=2, pp=1)
    with pytest.raises(ValueError, match="treat layers of different stages differently"):
        check_exportable(TINY, mixture(), tp=2, pp=2)
    layers = all_layers("int8")
    for index in (0, 2):
        layers[f"decoder.layers.{index}.mlp.linear_fc2"] = named_scheme("fp8")
    check_exportable(TINY, layers, tp=1, pp=2)
    assert len(config.quant_cfg_json(TINY, layers, pp=2)["quantized_layers"]) == 2 * 5


def test_weight_only_int8_is_refused_in_a_mixture():
    layers = all_layers("int8") | {"decoder.layers.0.mlp.linear_fc2": named_scheme("int8_wo")}
    with pytest.raises(
        ValueError, match=r"layers.0.mlp.linear_fc2: int8_wo .* in a mixture with W8A8_SQ_"
    ):
        check_exportable(TINY, layers, tp=1, pp=1, allow_requantization=True)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tp": 3}, r"inference_tensor_parallel=3 does not fit num_attention_heads=4"),
        ({"tp": 8}, r"inference_tensor_parallel=8 does not fit"),
        ({"tp": 0}, r"inference_tensor_parallel=0: must be at least 1"),
        ({"pp": 3}, r"inference_pipeline_parallel=3 does not divide num_layers=4"),
        ({"pp": -1}, r"inference_pipeline_parallel=-1: must be at least 1"),
    ],
)
def test_layouts_that_do_not_fit(sizes, message):
    with pytest.raises(ValueError, match=message):
        check("int8", **sizes)


@pytest.mark.parametrize(
    ("group_size", "tp", "model", "message"),
    [
        (32, 1, TINY, "group_size=32; TensorRT-LLM's INT4 kernels support 64 and 128 only"),
        (128, 4, TINY, r"in_features=256 is not a multiple of 512 .* fit here: \[64\]"),
        # qkv counts copied heads: (6 + 2 * 6) * 32 = 576 is not a multiple of 64 * 6.
        (64, 6, replace(TINY, hidden_size=768, num_attention_heads=6, num_query_groups=2,
                        head_dim=32, intermediate_size=768), "linear_qkv: out_features=576"),
        # One branch of the MLP, not the fused gate and up.
        (128, 1, replace(TINY, intermediate_size=192), "linear_fc1: out_features=192"),
    ],
)  # fmt: skip
def test_sizes_that_int4_kernels_cannot_take(group_size, tp, model, message):
    scheme = named_scheme("int4", group_size=group_size)
    layers = dict.fromkeys(all_layers("int4", model), scheme)
    with pytest.raises(ValueError, match=message):
        check_exportable(model, layers, tp=tp, pp=1)


def test_layers_left_unquantized_are_excluded_by_exact_name():
    layers = all_layers("int8")
    for index in (0, 2):
        del layers[f"decoder.layers.{index}.mlp.linear_fc1"]
    assert config.excluded_modules(TINY, layers, 1) == [
        *BUILT_IN,
        "transformer.layers.0.mlp.fc",
        "transformer.layers.0.mlp.gate",
        "transformer.layers.2.mlp.fc",
        "transformer.layers.2.mlp.gate",
    ]
    # Layer 0 of either stage: the names restart, and both stages agree.
    assert config.excluded_modules(TINY, layers, 2) == [
        *BUILT_IN,
        "transformer.layers.0.mlp.fc",
        "transformer.layers.0.mlp.gate",
    ]


def test_stages_that_leave_different_layers_unquantized_are_refused():
    layers = all_layers("int8")
    del layers["decoder.layers.0.mlp.linear_fc1"]
    check_exportable(TINY, layers, tp=1, pp=1)
    with pytest.raises(ValueError, match=r"quantization\.rules treat layers of different"):
        check_exportable(TINY, layers, tp=1, pp=2)


def test_only_weight_only_int8_warns():
    assert [a for a in EXPORTABLE if TRTLLM.warning(all_layers(a))] == ["int8_wo"]

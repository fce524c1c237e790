"""Every way in which `config.json` can be wrong is a problem that names the key, never a crash."""

import json

import pytest

from mqat.verify.formats.trtllm import read_config
from mqat.verify.verify import verify_export


def edited(directory, path, value):
    """Sets (or, for `...`, removes) a key of `config.json`, given as a dotted path."""
    file = directory / "config.json"
    config = json.loads(file.read_text())
    *parents, key = path.split(".")
    target = config
    for parent in parents:
        target = target[parent]
    if value is ...:
        del target[key]
    else:
        target[key] = value
    file.write_text(json.dumps(config))


def problems(directory):
    found = []
    assert (read_config(directory, found) is None) == bool(found)
    return found


def test_the_config_of_every_export_is_accepted(exported):
    for algorithm in ("null", "int8", "int8_wo", "int4", "fp8"):
        assert problems(exported(algorithm, tp=4, pp=2)) == []


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("architecture", "GPTForCausalLM", "architecture='GPTForCausalLM'"),
        ("architecture", ..., "architecture=None"),
        ("dtype", "float8", "dtype='float8'"),
        ("hidden_act", "swiglu", "hidden_act='swiglu'"),
        ("position_embedding_type", "rope_gptj", "position_embedding_type='rope_gptj'"),
        ("norm_epsilon", ..., "norm_epsilon=None"),
        ("norm_epsilon", -1e-5, "norm_epsilon=-1e-05"),
        ("rotary_base", "10000", "rotary_base='10000'"),
        ("rotary_scaling", {"type": "llama3"}, "rope scaling llama3: factor=None"),
        ("rotary_scaling", {"type": "yarn", "factor": 2.0}, "rope scaling {'type': 'yarn'"),
        ("hidden_size", 256.0, "hidden_size=256.0"),
        ("num_hidden_layers", 0, "num_hidden_layers=0"),
        ("vocab_size", True, "vocab_size=True"),
        ("num_hidden_layers", 5, "pp_size=2 does not divide num_hidden_layers=5"),
        ("num_key_value_heads", 3, "tp_size=2 does not fit heads 4, key/value heads 3"),
        ("attn_bias", 1, "attn_bias=1"),
        ("architecture", "Qwen2ForCausalLM", "qwen_type=None"),
        ("qwen_type", "qwen2", "unknown key 'qwen_type'"),
        ("qk_layernorm", 0, "qk_layernorm=0"),
        ("use_parallel_embedding", False, "use_parallel_embedding=False"),
        ("embedding_sharding_dim", 1, "embedding_sharding_dim=1"),
        ("share_embedding_table", True, "share_embedding_table=True"),
        ("surprise", 1, "unknown key 'surprise'"),
        ("mapping", ..., "mapping=None"),
        ("mapping.world_size", 3, "mapping.world_size=3 is not tp_size x pp_size"),
        ("mapping.tp_size", 0, "mapping.tp_size=0"),
        ("mapping.rank", 0, "unknown key mapping.rank"),
        ("quantization", None, "quantization: expected an object"),
        ("quantization.quant_algo", "W4A16_GPTQ", "quant_algo='W4A16_GPTQ'"),
        ("quantization.kv_cache_quant_algo", "NVFP4", "kv_cache_quant_algo='NVFP4'"),
        ("quantization.surprise", 1, "unknown key quantization.surprise"),
        ("quantization.group_size", 32, "quantization.group_size=32"),
        ("quantization.group_size", ..., "quantization.group_size=None"),
        ("quantization.pre_quant_scale", False, "quantization.pre_quant_scale=False"),
        ("quantization.has_zero_point", True, "quantization.has_zero_point=True"),
        ("quantization.exclude_modules", [], "exclude_modules lets lm_head be quantized"),
        ("quantization.exclude_modules", ["lm_head"], "lets transformer.vocab_embedding be"),
        ("quantization.exclude_modules", "*lm_head", "exclude_modules: expected a list"),
        ("intermediate_size", 192, "weight 192 x 256 has sizes that are no multiple of 128"),
    ],
)
def test_a_wrong_config_is_named(broken, path, value, message):
    directory = broken("int4", tp=2, pp=2)
    edited(directory, path, value)
    assert any(message in problem for problem in problems(directory)), problems(directory)
    assert not verify_export(directory).ok


def test_biases_that_a_config_announces_must_be_there(broken):
    directory = broken("int4", tp=2)
    edited(directory, "attn_bias", True)
    missing = verify_export(directory).problems
    assert "rank1.safetensors: transformer.layers.3.attention.dense.bias is missing" in missing
    assert len(missing) == 2 * 2 * 4


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"text"', "\udcff"])
def test_a_config_that_is_not_an_object_is_one_problem(broken, content):
    directory = broken("null")
    (directory / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    (problem,) = problems(directory)
    assert problem.startswith("config.json: ")


def test_a_missing_config_or_directory_is_a_problem(broken, tmp_path):
    directory = broken("null")
    (directory / "config.json").unlink()
    assert "config.json: unreadable" in verify_export(directory).problems[0]
    assert "no such directory" in verify_export(tmp_path / "nowhere").problems[0]


def test_no_exclusion_list_means_the_loaders_own(broken):
    directory = broken("int8")
    edited(directory, "quantization.exclude_modules", None)
    assert verify_export(directory).ok

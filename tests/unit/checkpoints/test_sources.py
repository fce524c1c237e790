"""What a source says twice must agree; what it says and nobody honours is refused; both by name."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors.torch import save_file

from mqat.checkpoints.hf_config import decoder_config
from mqat.checkpoints.source import open_pretrained
from mqat.models.decoder import DecoderConfig
from tests.unit.checkpoints.malformed_gguf import gguf_keys, gguf_tensors, write_gguf
from tests.unit.checkpoints.malformed_sources import LLAMA3, SIZES, good, write_directory

FACTORS = {key: value for key, value in LLAMA3.items() if key != "rope_type"}


def llama(**told):
    return decoder_config({"model_type": "llama", **SIZES, **told})


def refused(path, *, match):
    with pytest.raises(ValueError, match=match) as error:
        open_pretrained(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("told", [
    {"rope_scaling": LLAMA3}, {"rope_scaling": {"type": "llama3", **FACTORS}},
    {"rope_scaling": {**LLAMA3, "type": "llama3"}}, {"rope_parameters": {**LLAMA3,
    "rope_theta": 10000.0}},
    {"rope_scaling": {**LLAMA3, "partial_rotary_factor": 1.0, "truncate": True,
    "attention_factor": None}},
    {"rope_scaling": LLAMA3, "rope_parameters": {**LLAMA3, "type": "llama3"}},
])  # fmt: skip
def test_rope_scaling_has_one_spelling_inside(told):
    assert llama(**told).rope_scaling == LLAMA3
    assert list(llama(**told).rope_scaling) == list(LLAMA3)


@pytest.mark.parametrize(("told", "message"), [
    ({"rope_scaling": {"rope_type": "llama3", "type": "linear", **FACTORS}}, "'llama3' and 'linear'"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
    "rope_scaling.low_freq_factor is missing"),
    ({"rope_scaling": {"factor": 8.0}}, "rope_scaling.factor=8.0 is not honoured"),
    ({"rope_scaling": {**LLAMA3, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
    ({"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "contradict"),
    ({"rope_theta": 1e6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "contradict"),
    ({"attention_multiplier": 0.5}, "attention_multiplier=0.5 is not honoured"),
    ({"sliding_window": 64}, "sliding_window=64 is not honoured"),
    ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
    ({"quantization_config": {"quant_method": "fp8"}}, "the weights are quantized"),
    ({"auto_map": {"AutoModelForCausalLM": "m.M"}}, "code of its own"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "only LlamaForCausalLM is read"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "of the layers \\[\\]"),
    ({"hidden_size": "32"}, "hidden_size is '32', must be an integer"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"), ({"tie_word_embeddings": 1},
    "true or false"),
    ({"head_dim": 5}, "must be even"), ({"eos_token_id": [0, 40]},
    "not a token of a vocabulary of 40"),
])  # fmt: skip
def test_what_a_config_says_and_nobody_honours_is_refused(told, message):
    with pytest.raises(ValueError, match=message):
        llama(**told)


def test_harmless_keys_of_real_configs_are_read():
    told = {"torch_dtype": "bfloat16", "transformers_version": "4.44.0", "use_cache": True,
    "pretraining_tp": 1,
            "attention_dropout": 0.0, "rope_interleaved": False, "is_llama_config": True,
            "pad_token_id": -1,
            "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": [0, 2],
            "temperature": 0.6, "whatever": None, "unk_token_id": 3,
            "_model_name_or_path": "a GGUF file"}  # fmt: skip
    model = llama(**told)
    assert model.token_ids == {"bos_token_id": 1, "eos_token_id": [0, 2]}
    assert model.to_hf("bfloat16")["eos_token_id"] == [0, 2]
    assert DecoderConfig.from_dict(json.loads(json.dumps(model.to_dict()))) == model


def test_one_file_wins_over_an_index_as_in_transformers(tmp_path):
    case = good("llama")
    case.shards = 2
    path = write_directory(case, tmp_path / "model")
    new = {name: tensor + 1 for name, tensor in case.tensors.items()}
    save_file(new, path / "model.safetensors")
    with pytest.warns(UserWarning, match=r"model.safetensors is read, as transformers does"):
        source = open_pretrained(path)
    found = source.read("lm_head.weight", slice(None), slice(None))
    assert torch.equal(found, new["lm_head.weight"])
    (path / "model.safetensors").unlink()
    found = open_pretrained(path).read("lm_head.weight", slice(None), slice(None))
    assert torch.equal(found, case.tensors["lm_head.weight"])  # control


def test_shards_and_their_index_must_agree(tmp_path):
    case = good("llama")
    case.shards = 2
    path = write_directory(case, tmp_path / "model")
    index = path / "model.safetensors.index.json"
    whole = json.loads(index.read_text())["weight_map"]
    index.write_text(
        json.dumps({"weight_map": whole | {"lm_head.weight": whole["model.norm.weight"]}})
    )
    both = whole["lm_head.weight"], whole["model.norm.weight"]
    assert both[0] != both[1]
    refused(path, match=f"'lm_head.weight' is in {both[0]}, but .* says {both[1]}")
    index.unlink()
    refused(
        path,
        match=r"no model.safetensors .* found model-00001-of-00002.safetensors.* Download the index",
    )


def test_heads_and_flags_must_agree(tmp_path):
    case = good("llama-3")
    table = case.tensors["model.embed_tokens.weight"]
    case.tensors["lm_head.weight"] = table.clone()
    assert open_pretrained(write_directory(case, tmp_path / "same")).config.tie_word_embeddings
    case.tensors["lm_head.weight"] = table + torch.nn.functional.one_hot(torch.tensor(3), 32)
    refused(
        write_directory(case, tmp_path / "other"),
        match=r"tie_word_embeddings=true, but 'lm_head.weight'",
    )
    del case.tensors["lm_head.weight"]
    case.config["tie_word_embeddings"] = False
    refused(write_directory(case, tmp_path / "untied"), match=r"tensor 'lm_head.weight' is missing")


def test_mixed_dtypes_are_said_and_codes_are_refused(tmp_path):
    case = good("llama")
    case.tensors["model.norm.weight"] = case.tensors["model.norm.weight"].half()
    with pytest.warns(UserWarning, match="20 F32, 1 F16"):
        open_pretrained(write_directory(case, tmp_path / "mixed"))
    case.tensors["model.norm.weight"] = case.tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    refused(
        write_directory(case, tmp_path / "codes"),
        match=r"'model.norm.weight' is F8_E4M3, which are codes",
    )


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("-inf"), "infinite")])
def test_weights_that_are_no_numbers_are_named(tmp_path, value, word):
    case = good("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    case.tensors[name][3, 4] = value
    source = open_pretrained(write_directory(case, tmp_path / "model"))
    with pytest.raises(ValueError, match=f"'{name}' has elements that are {word}"):
        source.read(name, slice(0, 8), slice(None))
    assert source.read(name, slice(4, 8), slice(None)).isfinite().all()  # control


def test_what_is_no_whole_model_is_named(tmp_path):
    path = write_directory(good("llama"), tmp_path / "a")
    (path / "adapter_config.json").write_text("{}")
    refused(path, match="makes this an adapter, .* merge it into its base model")
    (path / "adapter_config.json").unlink()
    write_directory(good("qwen2"), tmp_path / "b")
    refused(tmp_path, match=r"holds 2 models \(a, b\); name one")
    (path / "model.safetensors").rename(path / "model.fp16.safetensors")
    refused(path, match=r"found model.fp16.safetensors\. Download the index")
    (path / "model.fp16.safetensors").rename(path / "pytorch_model.bin")
    refused(path, match="Pickled weights")


def gguf(path, change=lambda case: None):
    case = good("llama")
    config = decoder_config(case.config)
    case.tensors, case.config = gguf_tensors(config, case.tensors), gguf_keys("llama", config)
    change(case)
    return write_gguf(case, "llama", path) / "model.gguf", case


@pytest.mark.parametrize(("told", "message"), [
    ({"llama.rope.scaling.factor": -4.0}, "rope.scaling.factor' is -4.0, must be a positive number"),
    ({"llama.rope.scaling.type": "yarn"}, "rope scaling 'yarn'"), ({"llama.expert_count": 8},
    "expert_used_count' is missing"),
    ({"llama.logit_scale": 2.0}, "logit_scale"), ({"llama.attention.value_length": 4},
    "value_length=4, but heads"),
    ({"llama.rope.dimension_count": 4}, "dimension_count=4, but heads"),
    ({"llama.vocab_size": 41}, "contradictory: 41 llama.vocab_size, 40 tokenizer.ggml.tokens"),
    ({"llama.attention.head_count": [4, 4]}, "head_count' is .4, 4., must be an integer"),
    ({"llama.feed_forward_length": 24}, "ffn_gate.weight' has shape .48, 32., but its metadata"),
    ({"general.type": "adapter"}, "not a whole model"), ({"tokenizer.ggml.eot_token_id": 40},
    "eos_token_id=.0, 40."),
    ({"somebody.key": 1}, "'somebody.key' is 1, which is not honoured"),
])  # fmt: skip
def test_what_metadata_say_and_nobody_honours_is_refused(tmp_path, told, message):
    refused(gguf(tmp_path / "m", lambda case: case.config.update(told))[0], match=message)


def test_a_factor_alone_scales_positions_linearly_as_in_llama_cpp(tmp_path):
    told = {"llama.rope.scaling.factor": 4.0}
    config = open_pretrained(gguf(tmp_path / "m", lambda case: case.config.update(told))[0]).config
    assert config.rope_scaling == {"rope_type": "linear", "factor": 4.0}


def test_harmless_metadata_are_read(tmp_path):
    told = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 1.0,
    "llama.expert_count": 0,
            "tokenizer.ggml.eot_token_id": 2, "quantize.imatrix.file": "x",
            "general.license": "mit"}  # fmt: skip
    config = open_pretrained(gguf(tmp_path / "m", lambda case: case.config.update(told))[0]).config
    assert config.token_ids == {"eos_token_id": [0, 2]}


def test_files_of_a_split_model_are_read_together(tmp_path):
    whole, _ = gguf(tmp_path / "whole")
    names = [f"m-{number:05d}-of-00002.gguf" for number in (1, 2)]

    def part(number):
        def change(case):
            told = {"split.no": number, "split.count": 2, "split.tensors.count": 21}
            case.config = (case.config if number == 0 else {}) | told
            kept = [name for name in case.tensors if (".1." in name) == (number == 1)]
            case.tensors = {name: case.tensors[name] for name in kept}

        file, _ = gguf(tmp_path / str(number), change)
        return file

    folder = tmp_path / "split"
    folder.mkdir()
    part(0).rename(folder / names[0])
    refused(folder, match=r"m-00002-of-00002.gguf: no such file; the model is split")
    part(1).rename(folder / names[1])
    one = open_pretrained(whole)
    for path in (folder, *(folder / name for name in names)):
        found = open_pretrained(path)
        assert found.config == one.config and found.tokenizer_source == folder / names[0]
        for layer in (0, 1):
            name = f"model.layers.{layer}.self_attn.q_proj.weight"
            both = [source.read(name, slice(None), slice(None)) for source in (one, found)]
            assert torch.equal(*both)
    (folder / names[0]).rename(folder / "m.gguf")
    refused(
        folder / "m.gguf",
        match=r"first of 2 files, .* -00001-of-00002.gguf; .*llama-gguf-split --merge",
    )


def test_a_good_source_warns_of_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_pretrained(write_directory(good("llama-biased"), tmp_path / "model"))

"""Hugging Face directories: the files themselves, and what transformers makes of them."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mqat.export.export import export_hf
from mqat.quant.algorithm import named_scheme
from mqat.verify.verify import verify_export
from tests.unit.export.checkpoints import (
    BIASED,
    QWEN2,
    TINY,
    UNTIED,
    all_layers,
    tensors_of,
    write_checkpoint,
)
from tests.unit.export.test_export import Threads, contents
from tests.unit.verify.test_reader import (
    LLAMA3,
    TOKENS,
    equal_but_for_codes,
    qkv_parts,
    quantized,
    relative,
    replace,
    transformers_logits,
)

QUANTIZED = (
    "int8", "int8_pc_pt", "int8_wo", "int4", "w_int4_sym", "w_uint4_asym", "int4_w_int8_a", "8da4w",
    "fp8", "fp8_pc_pt", "nvfp4",
)  # fmt: skip


def export(checkpoint, out, **kwargs):
    export_hf(checkpoint, out, **{"dtype": "float32"} | kwargs)
    return contents(out)


def tensors(directory):
    merged = {}
    for file in directory.glob("*.safetensors"):
        merged |= load_file(file)
    return merged


def projections(model, state, index):
    """Module of layer `index` -> (Megatron linear, its unquantized float32 rows)."""
    q, k, v = qkv_parts(state["decoder.layers.self_attention.linear_qkv.weight"][index], model)
    gate, up = state["decoder.layers.mlp.linear_fc1.weight"][index].chunk(2)
    return {
        "self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v,
        "self_attn.o_proj": state["decoder.layers.self_attention.linear_proj.weight"][index],
        "mlp.gate_proj": gate, "mlp.up_proj": up,
        "mlp.down_proj": state["decoder.layers.mlp.linear_fc2.weight"][index],
    }  # fmt: skip


def on_grid(model, state, layers):
    """The checkpoint's tensors with every weight on its frozen grid."""
    result = dict(state)
    for key in [k for k in state if k.startswith("decoder.layers.") and "norm" not in k]:
        linear = key.removeprefix("decoder.layers.").removesuffix(".weight")
        stacked = []
        for index, weight in enumerate(state[key]):
            name = f"decoder.layers.{index}.{linear}"
            stacked.append(quantized(state, layers, name, weight, "weight"))
        result[key] = torch.stack(stacked)
    return result


@pytest.mark.parametrize("model", [TINY, UNTIED])
def test_an_unquantized_directory_holds_the_checkpoints_tensors(model, tmp_path):
    state = tensors_of(model, {})
    export(write_checkpoint(tmp_path / "c", model, {}), tmp_path / "out")
    found = tensors(tmp_path / "out")
    for index in range(model.num_layers):
        for name, weight in projections(model, state, index).items():
            assert torch.equal(found[f"model.layers.{index}.{name}.weight"], weight)
    vocab = model.vocab_size
    embedding = state["embedding.word_embeddings.weight"][:vocab]
    assert torch.equal(found["model.embed_tokens.weight"], embedding)
    assert ("lm_head.weight" in found) != model.tie_word_embeddings
    assert len(found) == 2 + (not model.tie_word_embeddings) + 9 * model.num_layers


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_round_once(dtype, tiny, tmp_path):
    export(tiny("null"), tmp_path / "out", dtype=dtype)
    expected = tensors_of(TINY, {})["decoder.layers.mlp.linear_fc2.weight"][2]
    found = tensors(tmp_path / "out")["model.layers.2.mlp.down_proj.weight"]
    assert torch.equal(found, expected.to(getattr(torch, dtype)))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == dtype


def test_transformers_computes_the_same_from_an_unquantized_directory(tmp_path):
    model = replace(UNTIED, rope_theta=500000.0, rope_scaling=LLAMA3, rms_norm_eps=1e-3)
    export(write_checkpoint(tmp_path / "c", model, {}), tmp_path / "out")
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        found = served(TOKENS).logits
    assert torch.equal(found, transformers_logits(model, {}, TOKENS))


@pytest.mark.parametrize(
    "algorithm",
    ["null", "int4", *(pytest.param(name, marks=pytest.mark.slow) for name in ("int8", "fp8"))],
)
@pytest.mark.parametrize(
    "model", [BIASED, QWEN2, replace(TINY, family="mistral")], ids=["biased", "qwen2", "mistral"]
)
def test_other_families_compute_the_same_in_transformers(model, algorithm, tmp_path):
    if algorithm != "null":
        pytest.importorskip("compressed_tensors", reason="optional: pip install 'mqat[hf]'")
    layers = all_layers(algorithm, model)
    checkpoint = write_checkpoint(tmp_path / "c", model, layers)
    export(checkpoint, tmp_path / "out")
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert served.config.model_type == model.family
    with torch.no_grad():
        found = served(TOKENS).logits
    expected = transformers_logits(model, layers, TOKENS)
    assert torch.equal(found, expected)
    report = verify_export(
        tmp_path / "out", reference=checkpoint, tokens=TOKENS, reference_logits=expected
    )
    assert report.problems == [] and report.mean_kl < 1e-3  # FP8 codes flip


def mixture():
    """INT4, INT8 and FP8 linears and an unquantized one in one model."""
    layers = all_layers("int4", UNTIED)
    layers["decoder.layers.0.mlp.linear_fc2"] = named_scheme("fp8")
    layers["decoder.layers.3.self_attention.linear_qkv"] = named_scheme("int8")
    del layers["decoder.layers.1.self_attention.linear_proj"]
    return layers


# What the package cannot load, or computes in another way (see `test_matrix`).
_ELSEWHERE = ("int8_pc_pt", "w_uint4_asym", "nvfp4")


@pytest.fixture(
    scope="module", params=[*(name for name in QUANTIZED if name not in _ELSEWHERE), "mixture"]
)
def loaded(request, tmp_path_factory):
    """(schemes, directory, what transformers loaded from it) of an untied model."""
    pytest.importorskip("compressed_tensors", reason="optional: pip install 'mqat[hf]'")
    root = tmp_path_factory.mktemp(request.param)
    layers = mixture() if request.param == "mixture" else all_layers(request.param, UNTIED)
    export(write_checkpoint(root / "c", UNTIED, layers), root / "out")
    model = AutoModelForCausalLM.from_pretrained(root / "out", dtype=torch.float32)
    return layers, root / "out", model


def test_transformers_computes_what_was_trained(loaded):
    """float32, in the same order: bit for bit, but for codes on a border (some processors)."""
    layers, _, model = loaded
    expected = transformers_logits(UNTIED, layers, TOKENS)
    with torch.no_grad():
        found = model(TOKENS).logits
    unquantized = transformers_logits(UNTIED, layers, TOKENS, quantize=False)
    has_codes = any(scheme.input is not None for scheme in layers.values())
    assert torch.equal(found, expected) or (
        has_codes and equal_but_for_codes(found, expected, unquantized)
    )
    assert relative(unquantized, expected) > 1e-2  # control: it is quantized


def test_weights_that_transformers_unpacked_are_the_trained_ones(loaded):
    layers, _, model = loaded
    with torch.no_grad():
        model(TOKENS[:1, :2])  # unpacks
    trained = on_grid(UNTIED, tensors_of(UNTIED, layers), layers)
    raw = tensors_of(UNTIED, layers)
    for index, layer in enumerate(model.model.layers):
        for name, expected in projections(UNTIED, trained, index).items():
            assert torch.equal(layer.get_submodule(name).weight, expected), (index, name)
        assert any(  # control: the unquantized weights differ
            not torch.equal(layer.get_submodule(name).weight, weight)
            for name, weight in projections(UNTIED, raw, index).items()
        )


def test_greedy_text_is_that_of_the_trained_model(loaded):
    layers, _, model = loaded
    prompt = TOKENS[:1, :6]
    found = model.generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=None)
    expected = prompt
    for _ in range(5):
        step = transformers_logits(UNTIED, layers, expected)[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat([expected, step], dim=1)
    assert torch.equal(found, expected)


def test_every_linear_is_in_one_group_or_ignored(loaded):
    _, directory, _ = loaded
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    if len(config["config_groups"]) == 1:
        return
    targets = [t for group in config["config_groups"].values() for t in group["targets"]]
    assert len(targets) == len(set(targets)) == 4 * 7 - 1
    assert config["ignore"] == ["lm_head", "model.layers.1.self_attn.o_proj"]
    formats = [group["format"] for group in config["config_groups"].values()]
    assert sorted(formats) == ["float-quantized", "int-quantized", "pack-quantized"]


def stored_linear(directory, name):
    """Suffix -> tensor of one linear."""
    found = tensors(directory).items()
    return {key.removeprefix(f"{name}."): t for key, t in found if key.startswith(f"{name}.")}


def scheme_of(directory):
    """The package's own reading of what `config.json` says about the weights."""
    from compressed_tensors.quantization import QuantizationScheme

    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    return QuantizationScheme(**config["config_groups"]["group_0"])


@pytest.mark.parametrize("algorithm", ["w_uint4_asym", "int8_pc_pt", "nvfp4"])
@pytest.mark.parametrize("group_size", [64, UNTIED.hidden_size])  # also one group a row
def test_zero_points_and_levels_unpack_with_the_packages_own_reader(
    algorithm, group_size, tmp_path
):
    pytest.importorskip("compressed_tensors", reason="optional: pip install 'mqat[hf]'")
    from compressed_tensors.compressors import BaseCompressor

    layers = all_layers(algorithm, UNTIED, group_size=group_size)
    export(write_checkpoint(tmp_path / "c", UNTIED, layers), tmp_path / "out")
    form = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"][
        "format"
    ]
    reader = BaseCompressor.load_from_registry(form)
    trained = on_grid(UNTIED, tensors_of(UNTIED, layers), layers)
    for name, expected in projections(UNTIED, trained, 1).items():
        stored = stored_linear(tmp_path / "out", f"model.layers.1.{name}")
        found = reader.decompress(stored, scheme_of(tmp_path / "out"))["weight"]
        if algorithm == "nvfp4":  # the reciprocal of a scale is stored, and values are bfloat16
            torch.testing.assert_close(found.float(), expected, rtol=2**-7, atol=0)
        else:
            assert torch.equal(found.float(), expected)
        assert not torch.equal(expected, projections(UNTIED, tensors_of(UNTIED, layers), 1)[name])


def test_transformers_quantizes_fp4_inputs_as_trained(tmp_path):
    pytest.importorskip("compressed_tensors", reason="optional: pip install 'mqat[hf]'")
    layers, name = all_layers("nvfp4", UNTIED), "decoder.layers.1.mlp.linear_fc2"
    export(write_checkpoint(tmp_path / "c", UNTIED, layers), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    state = tensors_of(UNTIED, layers)
    weight = state["decoder.layers.mlp.linear_fc2.weight"][1]
    x = torch.randn(64, UNTIED.intermediate_size, generator=torch.Generator().manual_seed(2))
    on_weight = quantized(state, layers, name, weight, "weight")
    expected = quantized(state, layers, name, x, "input") @ on_weight.t()
    with torch.no_grad():
        model(TOKENS[:1, :2])  # unpacks
        found = model.model.layers[1].mlp.down_proj(x.bfloat16()).float()
    assert relative(found, expected) < 0.03  # bfloat16
    assert relative(x @ on_weight.t(), expected) > 0.06  # control: unquantized inputs


@pytest.mark.parametrize("algorithm", ["null", *QUANTIZED])
def test_how_the_checkpoint_was_cut_and_how_many_write_does_not_change_a_byte(
    algorithm, tiny, tmp_path
):
    alone = export(tiny(algorithm), tmp_path / "alone", max_shard_bytes=300_000)
    assert sum(name.endswith(".safetensors") for name in alone) > 3
    cut = write_checkpoint(tmp_path / "cut", TINY, all_layers(algorithm), cuts=3)
    assert export(cut, tmp_path / "b", max_shard_bytes=300_000) == alone

    def work(rank, world_size, raise_on_any_rank):
        export(
            tiny(algorithm), tmp_path / "together", max_shard_bytes=300_000,
            rank=rank, world_size=world_size, raise_on_any_rank=raise_on_any_rank,
        )  # fmt: skip

    assert Threads(2).run(work) == [None] * 2
    assert contents(tmp_path / "together") == alone


def test_shards_hold_the_same_tensors_and_the_index_says_where(tiny, tmp_path):
    export(tiny("int8"), tmp_path / "one")
    export(tiny("int8"), tmp_path / "many", max_shard_bytes=500_000)
    one, many = tensors(tmp_path / "one"), tensors(tmp_path / "many")
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name].view(torch.uint8), many[name].view(torch.uint8))
               for name in one)  # fmt: skip
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "many" / file)
    assert index["weight_map"].keys() == one.keys()
    total = sum(t.numel() * t.element_size() for t in one.values())
    assert index["metadata"]["total_size"] == total
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists()
    sizes = [f.stat().st_size for f in (tmp_path / "many").glob("*.safetensors")]
    assert max(sizes) < 600_000


def test_tokenizer_files_and_where_the_model_stops(tiny, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "c", TINY, {})
    tokenizer = checkpoint / "tokenizer"
    added = [{"id": 7, "content": "<s>"}, {"id": 9, "content": "</s>"}]
    (tokenizer / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    names = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(names))
    (tokenizer / "chat_template.jinja").write_text("{{ messages }}")
    from tests.unit.export.checkpoints import describe

    describe(checkpoint)
    written = export(checkpoint, tmp_path / "out")
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= written.keys()
    config, settings = (
        json.loads(written[name]) for name in ("config.json", "generation_config.json")
    )
    assert config["bos_token_id"] == settings["bos_token_id"] == 7
    assert config["eos_token_id"] == settings["eos_token_id"] == 9
    assert "pad_token_id" not in config
    # The settings of the imported model win: it stops at two tokens.
    (tokenizer / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 11]}))
    describe(checkpoint)
    written = export(checkpoint, tmp_path / "again")
    assert json.loads(written["generation_config.json"]) == {"eos_token_id": [9, 11]}
    assert json.loads(written["config.json"])["eos_token_id"] == [9, 11]


def test_modelopt_style_of_fp8(tiny, tmp_path):
    written = export(tiny("fp8"), tmp_path / "out", style="modelopt")
    quantization = json.loads(written["hf_quant_config.json"])["quantization"]
    assert quantization == {
        "quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]
    }  # fmt: skip
    flat = json.loads(written["config.json"])["quantization_config"]
    assert flat["quant_method"] == "modelopt" and flat["ignore"] == ["lm_head"]
    found = tensors(tmp_path / "out")
    name = "model.layers.1.self_attn.k_proj"
    assert found[f"{name}.weight"].dtype == torch.float8_e4m3fn
    state = tensors_of(TINY, all_layers("fp8"))
    for kind in ("weight_scale", "input_scale"):
        frozen = state[f"quantizers.decoder.layers.1.self_attention.linear_qkv.{kind}"]
        assert found[f"{name}.{kind}"].shape == () and float(found[f"{name}.{kind}"]) == float(
            frozen
        )


@pytest.mark.parametrize(
    ("algorithm", "arguments", "message"),
    [
        (
            "int8",
            {"style": "modelopt"},
            r"linear_qkv: int8 \(weight int8 .* to ModelOpt style.*compressed-tensors",
        ),
        (
            "fp8",
            {"style": "gguf"},
            "export.style='gguf': must be one of compressed-tensors, modelopt",
        ),
        ("fp8", {"dtype": "fp16"}, "export.dtype='fp16'"),
        ("fp8", {"max_shard_bytes": 0}, "max_shard_bytes=0: must be at least 1"),
    ],
)
def test_what_cannot_be_written_is_refused(algorithm, arguments, message, tiny, tmp_path):
    with pytest.raises(ValueError, match=message):
        export(tiny(algorithm), tmp_path / "x" / "out", **arguments)
    assert not (tmp_path / "x").exists()


def test_groups_that_do_not_divide_a_row_are_refused(tmp_path):
    model = replace(TINY, intermediate_size=160)
    checkpoint = write_checkpoint(tmp_path / "c", model, all_layers("int4", model))
    with pytest.raises(ValueError, match=r"linear_fc2: group_size=64 .* in_features=160.*\[32\]"):
        export(checkpoint, tmp_path / "out")

"""Hugging Face directories: clean ones pass, and every corruption is named."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from mqat.export.export import export_hf
from mqat.verify.verify import verify_export
from tests.unit.export.checkpoints import TINY, UNTIED, all_layers, tensors_of, write_checkpoint
from tests.unit.export.test_hf import mixture
from tests.unit.verify.test_reader import (
    TOKENS,
    equal_but_for_codes,
    relative,
    replace,
    served_logits,
    transformers_logits,
)

_FORMS = [
    ("null", "compressed-tensors"), ("int8", "compressed-tensors"),
    ("int8_wo", "compressed-tensors"), ("int4", "compressed-tensors"),
    ("int4_w_int8_a", "compressed-tensors"), ("fp8", "compressed-tensors"), ("fp8", "modelopt"),
    ("mixture", "compressed-tensors"),
]  # fmt: skip
FAST = ("fp8-modelopt", "mixture-compressed-tensors")
FORMS = [
    pytest.param(form, id="-".join(form), marks=[] if "-".join(form) in FAST else pytest.mark.slow)
    for form in _FORMS
]
LAYER = "model.layers.2."
Q, K, V = (f"{LAYER}self_attn.{p}_proj" for p in "qkv")
GATE, UP, DOWN = (f"{LAYER}mlp.{p}_proj" for p in ("gate", "up", "down"))


@pytest.fixture(scope="module", params=FORMS)
def case(request, tmp_path_factory):
    """(schemes, checkpoint, exported directory in two shards); shared, so never changed."""
    algorithm, style = request.param
    root = tmp_path_factory.mktemp("hf")
    layers = mixture() if algorithm == "mixture" else all_layers(algorithm, UNTIED)
    checkpoint = write_checkpoint(root / "checkpoint", UNTIED, layers)
    size = {"null": 6_000_000, "int4": 1_200_000, "mixture": 1_200_000}.get(algorithm, 2_000_000)
    export_hf(checkpoint, root / "out", style=style, max_shard_bytes=size, dtype="float32")
    return layers, checkpoint, root / "out"


@pytest.fixture
def copy(case, tmp_path):
    return shutil.copytree(case[2], tmp_path / "copy")


def rewrite(directory, change):
    """Applies `change` to all tensors of a directory; each goes back to the file it came from."""
    owner, tensors = {}, {}
    for file in directory.glob("*.safetensors"):
        loaded = load_file(file)
        owner |= dict.fromkeys(loaded, file)
        tensors |= loaded
    change(tensors)
    for file in set(owner.values()):
        kept = {n: t.contiguous() for n, t in tensors.items() if owner.get(n, file) == file}
        save_file(kept, file)


def test_a_clean_directory_passes_and_computes_the_trained_logits(case):
    layers, checkpoint, directory = case
    expected = transformers_logits(UNTIED, layers, TOKENS)
    report = verify_export(
        directory, reference=checkpoint, tokens=TOKENS, reference_logits=expected
    )
    assert report.problems == [] and report.compared_with_checkpoint
    assert report.num_files > 1
    found = served_logits(directory, TOKENS)
    assert report.max_abs_difference == float((found - expected).abs().max())
    if not layers:
        assert report.max_abs_difference < 1e-4
        return
    unquantized = transformers_logits(UNTIED, layers, TOKENS, quantize=False)
    assert equal_but_for_codes(found, expected, unquantized)
    assert relative(unquantized, expected) > 1e-2  # control: it is quantized


def test_one_flipped_bit_in_any_kind_of_tensor_is_named(case, copy):
    _, checkpoint, directory = case
    names = [n for f in directory.glob("*.safetensors") for n in load_file(f)]
    kinds = [n for n in names if n.startswith((LAYER, "model.norm", "model.embed", "lm_head"))]
    assert len(kinds) >= 12
    originals = {file: file.read_bytes() for file in copy.glob("*.safetensors")}
    for name in kinds:

        def flip(tensors, name=name):
            bits = tensors[name].view(-1).view(torch.uint8)
            bits[bits.numel() // 2 & ~7] ^= 1

        rewrite(copy, flip)
        problems = verify_export(copy, reference=checkpoint).problems
        assert any(name in problem for problem in problems), (name, problems)
        for file, data in originals.items():
            file.write_bytes(data)
    assert verify_export(copy, reference=checkpoint).ok  # control: it was the bit


def weight_of(tensors, module):
    return next(n for n in (f"{module}.weight", f"{module}.weight_packed") if n in tensors)


def swap(first, second):
    """Exchanges two modules; of unequal height, as many rows as both have."""

    def change(tensors):
        for name in [n for n in tensors if n.startswith(f"{first}.")]:
            other = second + name.removeprefix(first)
            if name.endswith("_shape") or tensors[name].dim() == 0:
                continue
            rows = min(len(tensors[name]), len(tensors[other]))
            kept = tensors[name][:rows].clone()
            tensors[name][:rows] = tensors[other][:rows]
            tensors[other][:rows] = kept
        return weight_of(tensors, first)

    return change


def transpose(tensors):
    name = weight_of(tensors, f"{LAYER}self_attn.o_proj")
    tensors[name] = tensors[name].t()
    return name


def scaled(module, suffix, function):
    def change(tensors):
        name = f"{module}.{suffix}"
        if name not in tensors:
            return None
        tensors[name] = function(tensors[name].float()).to(tensors[name].dtype)
        return name

    return change


def shift_groups(tensors):
    name = f"{DOWN}.weight_scale"
    if name not in tensors or tensors[name].dim() < 2 or tensors[name].shape[1] < 2:
        return None
    tensors[name] = tensors[name].roll(1, dims=1)
    return name


def swap_nibbles(tensors):
    name = f"{UP}.weight_packed"
    if name not in tensors or tensors[name].shape[1] != 256 // 8:
        return None
    bits = tensors[name].view(torch.uint8)
    tensors[name] = (bits >> 4 | bits << 4).view(torch.int32)
    return name


def reverse_words(tensors):
    name = f"{UP}.weight_packed"
    if name not in tensors:
        return None
    tensors[name] = (
        tensors[name].view(torch.uint8).unflatten(1, (-1, 4)).flip(2).flatten(1).view(torch.int32)
    )
    return name


def remove_head(tensors):
    del tensors["lm_head.weight"]
    return "lm_head.weight"


def wrong_shape_note(tensors):
    name = f"{K}.weight_shape"
    if name not in tensors:
        return None
    tensors[name] = tensors[name].flip(0)
    return name


def one_scale_of_a_fused_input(tensors):
    name = f"{V}.input_scale"
    if name not in tensors:
        return None
    tensors[name] = tensors[name] * 1.5
    return name


CORRUPTIONS = {
    "gate and up": swap(GATE, UP),
    "query and key": swap(Q, K),
    "key and value": swap(K, V),
    "two layers": swap(DOWN, "model.layers.3.mlp.down_proj"),
    "transposed": transpose,
    "scale x 2": scaled(DOWN, "weight_scale", lambda t: t * 2),
    "scale / 2": scaled(K, "weight_scale", lambda t: t / 2),
    "inverted": scaled(DOWN, "weight_scale", lambda t: 1 / t),
    "input scale x 2": scaled(DOWN, "input_scale", lambda t: t * 2),
    "input scale inverted": scaled(DOWN, "input_scale", lambda t: 1 / t),
    "groups off by one": shift_groups,
    "nibble order": swap_nibbles,
    "word order": reverse_words,
    "no head": remove_head,
    "wrong unpacked shape": wrong_shape_note,
    "fused inputs differ": one_scale_of_a_fused_input,
    "NaN": scaled(DOWN, "weight_scale", lambda t: t * float("nan")),
}


def test_every_corruption_is_named(case, copy):
    layers, checkpoint, _ = case
    originals = {file: file.read_bytes() for file in copy.glob("*.safetensors")}
    applied = []
    for label, corruption in CORRUPTIONS.items():
        named = []
        rewrite(copy, lambda tensors, c=corruption, named=named: named.append(c(tensors)))
        if named[0] is not None:
            applied.append(label)
            problems = verify_export(copy, reference=checkpoint).problems
            assert any(named[0] in problem for problem in problems), (label, named, problems)
        for file, data in originals.items():
            file.write_bytes(data)
    assert len(applied) >= (6 if not layers else 9), applied


def test_files_and_index_that_do_not_fit(case, copy):
    _, checkpoint, _ = case
    first, second = sorted(copy.glob("*.safetensors"))[:2]
    index = copy / "model.safetensors.index.json"
    saved = index.read_text()

    def problems():
        return verify_export(copy, reference=checkpoint).problems

    (copy / "model.safetensors").write_bytes(b"old")
    assert "model.safetensors: stale, not part of this model" in problems()
    (copy / "model.safetensors").unlink()
    moved = first.read_bytes()
    first.unlink()
    assert f"{first.name}: missing" in problems()
    first.write_bytes(moved[:-8])
    assert any(p.startswith(f"{first.name}: truncated") for p in problems())
    first.write_bytes(second.read_bytes())
    assert any(f": is in {first.name} and in {second.name}" in p for p in problems())
    first.write_bytes(moved)
    wrong = json.loads(saved)
    owner = wrong["weight_map"]["lm_head.weight"]
    assert owner != first.name
    wrong["weight_map"]["lm_head.weight"] = first.name
    index.write_text(json.dumps(wrong))
    assert any(f"lm_head.weight is in {owner}, not in {first.name}" in p for p in problems())
    index.write_text("{")
    assert any(p.startswith("model.safetensors.index.json: unusable") for p in problems())
    index.write_text(saved)
    assert verify_export(copy, reference=checkpoint).ok


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("num_hidden_layers", 0, "num_hidden_layers=0"),
        ("model_type", "opt", "model_type='opt'"),
        ("model_type", "qwen2", "architectures=['LlamaForCausalLM']"),
        ("torch_dtype", "float8", "torch_dtype='float8'"),
        ("rope_theta", None, "rope_theta=None"),
        ("rope_theta", 9999.0, "rope_theta=9999.0, but the checkpoint has"),
        ("rms_norm_eps", 1e-6, "rms_norm_eps=1e-06, but the checkpoint has"),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0}, "rope_scaling="),
        ("attention_bias", True, "self_attn.o_proj.bias is missing"),
        ("num_key_value_heads", 3, "is not a multiple of num_key_value_heads"),
        ("tie_word_embeddings", False, "lm_head.weight is missing"),
        ("quantization_config", None, "weight_packed"),
        ("quantization_config.quant_method", "gptq", "quant_method='gptq'"),
        ("quantization_config.ignore", [], "ignore with lm_head"),
        ("quantization_config.format", "marlin-24", "format 'marlin-24'"),
        ("quantization_config.quantization_status", "frozen", "quantization_status='frozen'"),
        ("quantization_config.config_groups.group_0.weights.group_size", 32, "weight_scale is"),
        ("quantization_config.config_groups.group_0.weights.num_bits", 8, "weight_packed is"),
        ("quantization_config.config_groups.group_0.weights.symmetric", False, "weight_zero_point"),
        ("quantization_config.config_groups.group_0.weights.dynamic", True, "must be static"),
        ("quantization_config.config_groups.group_0.weights.strategy", "block", "'block'"),
        ("quantization_config.config_groups.group_0.targets", ["model.layers.9.x"], "not a linear"),
        ("quantization_config.config_groups.group_0.input_activations",
         {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
         "served as"),
        ("quantization_config.config_groups.group_0.input_activations",
         {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "group", "dynamic": True},
         "input_activations"),
    ],
)  # fmt: skip
def test_a_wrong_config_is_named(path, value, message, tiny, tmp_path):
    export_hf(tiny("int4"), tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    config = target = json.loads(file.read_text())
    *parents, key = path.split(".")
    for parent in parents:
        target = target[parent]
    target[key] = value
    file.write_text(json.dumps(config))
    problems = verify_export(tmp_path / "out", reference=tiny("int4")).problems
    assert any(message in problem for problem in problems), problems


def test_scales_recomputed_from_the_trained_weights_are_found(tmp_path, tiny):
    from mqat.quant.scales import compute_amax, compute_scale

    state = tensors_of(TINY, all_layers("int8"))
    for name, scheme in all_layers("int8").items():
        index, linear = name.removeprefix("decoder.layers.").split(".", 1)
        weight = state[f"decoder.layers.{linear}.weight"][int(index)]
        amax = compute_amax(weight, scheme.weight.granularity)
        state[f"quantizers.{name}.weight_scale"] = compute_scale(amax, scheme.weight.format)
    other = write_checkpoint(tmp_path / "c", TINY, all_layers("int8"), tensors=state)
    export_hf(other, tmp_path / "out")
    problems = verify_export(tmp_path / "out", reference=tiny("int8")).problems
    assert any("q_proj.weight_scale is not the frozen scale" in p for p in problems)


def test_the_export_of_another_checkpoint_is_a_problem_not_a_crash(tiny, tmp_path):
    export_hf(tiny("int8"), tmp_path / "out")
    for algorithm in ("null", "int4", "fp8"):
        assert not verify_export(tmp_path / "out", reference=tiny(algorithm)).ok
    other = write_checkpoint(tmp_path / "other", replace(TINY, num_layers=2), {})
    assert not verify_export(tmp_path / "out", reference=other).ok


@pytest.mark.parametrize("style", ["compressed-tensors", "modelopt"])
def test_fused_parts_with_one_scale_are_judged_together(style, tmp_path):
    """A value weight an eighth of the query's uses codes up to 56: one scale per tensor has no other."""
    layers = all_layers("fp8", UNTIED)
    state = tensors_of(UNTIED, layers)
    qkv = state["decoder.layers.self_attention.linear_qkv.weight"].view(4, 2, 4, 64, 256)
    qkv[:, :, 3] /= 8  # by query group: two query heads, key, value
    checkpoint = write_checkpoint(tmp_path / "checkpoint", UNTIED, layers, tensors=state)
    out = tmp_path / "out"
    export_hf(checkpoint, out, style=style)
    assert verify_export(out, reference=checkpoint).problems == []
    for part in "qk":  # control: what none of them reaches is too large a scale for all

        def shrink(tensors, name=f"{LAYER}self_attn.{part}_proj.weight"):
            tensors[name] = (tensors[name].float() / 8).to(torch.float8_e4m3fn)

        assert verify_export(out).ok
        rewrite(out, shrink)
    (problem,) = verify_export(out).problems
    assert "q_proj.weight" in problem and "v_proj.weight together use codes up to" in problem

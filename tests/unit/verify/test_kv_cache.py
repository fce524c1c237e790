"""Quantized key/value caches in every format that holds them: served as trained, corruption named."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from mqat.evaluation.inspect import rows
from mqat.export.export import export_hf, export_trtllm
from mqat.verify.decoder import Past
from mqat.verify.verify import open_export, verify_export
from tests.unit.export.checkpoints import (
    TINY,
    all_caches,
    all_layers,
    tensors_of,
    write_checkpoint,
)
from tests.unit.verify.test_reader import TOKENS, equal_but_for_codes, relative, transformers_logits

TRTLLM = "transformer.layers.1.attention.kv_cache_scaling_factor"
# Cache, scales, algorithm, target, tensors of layer 1 of the first file.
CASES = {
    "trtllm-int8": ("int8", "shared", "int4", (1, 1), [TRTLLM]),
    "trtllm-fp8": ("fp8", "shared", "fp8", (1, 1), [TRTLLM]),
    "trtllm-tp4": ("int8", "shared", "null", (4, 1), [TRTLLM]),
    "trtllm-tp2-pp2": ("fp8", "shared", "int8", (2, 2), [TRTLLM]),
    "compressed-tensors": ("fp8", "separate", "int4", "compressed-tensors",
                           [f"model.layers.1.self_attn.{p}_scale" for p in "kv"]),
    "modelopt": ("fp8", "separate", "fp8", "modelopt",
                 [f"model.layers.1.self_attn.{p}_proj.{p}_scale" for p in "kv"]),
    "modelopt-shared": ("fp8", "shared", "fp8", "modelopt",
                        [f"model.layers.1.self_attn.{p}_proj.{p}_scale" for p in "kv"]),
}  # fmt: skip


def export(checkpoint, out, target):
    if isinstance(target, str):
        export_hf(checkpoint, out, style=target, dtype="float32")
    else:
        tp, pp = target
        export_trtllm(checkpoint, out, tensor_parallel=tp, pipeline_parallel=pp, dtype="float32")


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """(schemes, checkpoint, exported directory, names of scales); shared, so never changed."""
    name, scales, algorithm, target, names = CASES[request.param]
    root = tmp_path_factory.mktemp(request.param)
    layers = all_layers(algorithm) | all_caches(name, scales)
    checkpoint = write_checkpoint(root / "checkpoint", TINY, layers, cuts=2)
    export(checkpoint, root / "out", target)
    return layers, checkpoint, root / "out", names


def test_tokens_one_after_another_give_the_logits_of_all_at_once(case):
    decoder = open_export(case[2], keeps_weights=True)
    expected, past = decoder.logits(TOKENS), Past()
    parts = TOKENS.split([3, 1, 1, TOKENS.shape[1] - 5], dim=1)
    found = torch.cat([decoder.logits(part, past=past) for part in parts], dim=1)
    unquantized = transformers_logits(TINY, case[0], TOKENS, quantize=False)
    assert equal_but_for_codes(found, expected, unquantized) and past.tokens == TOKENS.shape[1]
    without_past = decoder.logits(TOKENS[:, 3:])  # control
    assert not equal_but_for_codes(without_past, expected[:, 3:], unquantized[:, 3:])


def first_file(directory):
    return sorted(directory.glob("*.safetensors"))[0]


def rewrite(directory, change):
    tensors = load_file(first_file(directory))
    change(tensors)
    save_file(tensors, first_file(directory))


def test_the_directory_holds_the_frozen_scales_and_computes_the_trained_logits(case):
    layers, checkpoint, directory, names = case
    expected = transformers_logits(TINY, layers, TOKENS)
    report = verify_export(
        directory, reference=checkpoint, tokens=TOKENS, reference_logits=expected
    )
    assert report.problems == []
    assert report.max_abs_difference is not None and report.mean_kl < 1e-3
    state, module = tensors_of(TINY, layers), "decoder.layers.1.self_attention.core_attention"
    frozen = [t for n, t in state.items() if n.startswith(f"quantizers.{module}.")]
    served = load_file(first_file(directory))
    assert [served[name].reshape(1) for name in names] == (frozen * 2)[: len(names)]
    assert all(served[name].dtype == torch.float32 for name in names)


def test_the_reader_quantizes_the_cache(case):
    layers, _, directory, _ = case
    from mqat.verify.verify import open_export

    served = open_export(directory).logits(TOKENS)
    without = {name: s for name, s in layers.items() if "core_attention" not in name}
    error = relative(served, transformers_logits(TINY, layers, TOKENS))
    control = relative(served, transformers_logits(TINY, without, TOKENS))
    assert error < 0.3 * control and control > 5e-3


@pytest.mark.parametrize("factor", [2.0, -1.0, 0.0, float("nan"), 1 + 2.0**-23])
def test_a_changed_scale_is_found_and_named(case, tmp_path, factor):
    _, checkpoint, directory, names = case
    for name in names:
        copy = shutil.copytree(directory, tmp_path / name)
        rewrite(copy, lambda tensors, name=name: tensors[name].mul_(factor))
        problems = verify_export(copy, reference=checkpoint).problems
        assert any(name in problem for problem in problems), problems


def test_a_missing_or_misshapen_scale_is_found_and_named(case, tmp_path):
    _, checkpoint, directory, names = case

    def reshape(tensors):
        tensors[names[0]] = tensors[names[0]].reshape(1, 1)

    for number, change in enumerate((lambda tensors: tensors.pop(names[0]), reshape)):
        copy = shutil.copytree(directory, tmp_path / str(number))
        rewrite(copy, change)
        problems = verify_export(copy, reference=checkpoint).problems
        assert any(names[0] in problem for problem in problems), problems


def edit(file, change):
    text = json.loads(file.read_text())
    change(text)
    file.write_text(json.dumps(text))


def test_a_config_without_the_cache_is_found(case, tmp_path):
    _, checkpoint, directory, _ = case
    copy = shutil.copytree(directory, tmp_path / "copy")
    raw = json.loads((copy / "config.json").read_text())
    if "quantization" in raw:
        edit(copy / "config.json", lambda c: c["quantization"].update(kv_cache_quant_algo=None))
    else:
        edit(copy / "config.json", lambda c: c["quantization_config"].update(kv_cache_scheme=None))
    problems = verify_export(copy, reference=checkpoint).problems
    assert any("is not expected" in problem or "kv_cache" in problem for problem in problems)


def test_exports_do_not_depend_on_how_the_checkpoint_was_cut(tmp_path):
    layers = all_layers("int8") | all_caches("int8")
    files = []
    for cuts in (1, 2):
        checkpoint = write_checkpoint(tmp_path / f"in{cuts}", TINY, layers, cuts=cuts)
        export(checkpoint, tmp_path / f"out{cuts}", (2, 1))
        files.append([f.read_bytes() for f in sorted((tmp_path / f"out{cuts}").glob("rank*"))])
    assert files[0] == files[1] and len(files[0]) == 2


def test_a_mixture_says_the_cache_in_both_files(tmp_path):
    layers = all_layers("int8") | all_caches("fp8")
    layers["decoder.layers.0.mlp.linear_fc1"] = all_layers("int4")[
        "decoder.layers.0.mlp.linear_fc1"
    ]
    checkpoint = write_checkpoint(tmp_path / "in", TINY, layers)
    out = tmp_path / "out"
    export(checkpoint, out, (1, 1))
    assert json.loads((out / "quant_cfg.json").read_text())["kv_cache_quant_algo"] == "FP8"
    assert verify_export(out, reference=checkpoint).problems == []
    edit(out / "quant_cfg.json", lambda c: c.update(kv_cache_quant_algo=None))
    (problem,) = verify_export(out).problems
    assert "quant_cfg.json: kv_cache_quant_algo is not config.json's ('FP8')" in problem


def test_inspect_shows_the_cache(case):
    layers, checkpoint, directory, _ = case
    scheme = next(s for n, s in layers.items() if "core_attention" in n)
    found = [row for row in rows(checkpoint) if row.linear.endswith("core_attention")]
    assert len(found) == TINY.num_layers
    assert all(row.form == f"cache: {scheme.tensor.format.name}" for row in found)
    steps = tensors_of(TINY, layers)
    last = f"quantizers.{found[-1].linear}.{scheme.scale_of('value')}_scale"
    assert found[-1].scale.amax() >= steps[last] >= found[-1].scale.amin()
    served = [row for row in rows(directory) if row.form.startswith("cache: ")]
    assert served and served[-1].scale.amax() in found[-1].scale

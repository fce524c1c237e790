"""The facts of verify are a second opinion: where they contradict the exporter, somebody is wrong."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from mqat.export.export import export_hf, export_trtllm
from mqat.models.decoder import FAMILIES
from mqat.verify import facts
from mqat.verify.verify import open_export, verify_export
from tests.unit.export.checkpoints import TINY, UNTIED, all_layers, tensors_of, write_checkpoint
from tests.unit.verify.test_reader import TOKENS, relative


def test_every_family_has_its_facts():
    assert {file.stem for file in facts.FOLDER.glob("*.yaml")} == set(FAMILIES)
    for family in FAMILIES:
        assert facts.read_facts(family).family == family


@pytest.fixture
def edit_facts(tmp_path, monkeypatch):
    """Replaces strings in the facts of the Llama family, of a copy."""
    folder = shutil.copytree(facts.FOLDER, tmp_path / "facts")
    monkeypatch.setattr(facts, "FOLDER", folder)

    def edit(*pairs):
        text = (folder / "llama.yaml").read_text()
        for number, (old, _) in enumerate(pairs):
            assert old in text
            text = text.replace(old, f"<{number}>")
        for number, (_, new) in enumerate(pairs):
            text = text.replace(f"<{number}>", new)
        (folder / "llama.yaml").write_text(text)
        facts.read_facts.cache_clear()

    yield edit
    facts.read_facts.cache_clear()


@pytest.mark.parametrize(("form", "gate", "up"), [
    ("hf", "mlp.gate_proj", "mlp.up_proj"), ("trtllm", "mlp.fc", "mlp.gate"),
])  # fmt: skip
def test_facts_that_swap_gate_and_up_contradict_a_good_export(
    form, gate, up, tiny, tmp_path, edit_facts
):
    if form == "hf":
        export_hf(tiny("int8"), tmp_path / "out")
    else:
        export_trtllm(tiny("int8"), tmp_path / "out", tensor_parallel=2)
    assert verify_export(tmp_path / "out", reference=tiny("int8")).ok  # control
    edit_facts((f"{form}: {gate}", f"{form}: {up}"), (f"{form}: {up}", f"{form}: {gate}"))
    problems = verify_export(tmp_path / "out", reference=tiny("int8")).problems
    assert any(f"{gate}.weight is not the checkpoint's" in problem for problem in problems)


def test_norms_of_query_and_key_heads_are_applied_where_the_facts_name_them(tmp_path, edit_facts):
    """In the decoder a family with them needs facts alone."""
    export_hf(write_checkpoint(tmp_path / "c", UNTIED, {}), tmp_path / "out", dtype="float32")
    before = open_export(tmp_path / "out").logits(TOKENS)
    norm = "  {0}_norm: {{size: head, checkpoint: {0}, hf: self_attn.{1}_norm, trtllm: {0}}}\n"
    added = norm.format("query", "q") + norm.format("key", "k")
    edit_facts(("norms:", "norms:\n" + added))
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    for layer in range(UNTIED.num_layers):
        for part in "qk":
            tensors[f"model.layers.{layer}.self_attn.{part}_norm.weight"] = torch.ones(64)
    save_file(tensors, file)
    assert relative(open_export(tmp_path / "out").logits(TOKENS), before) > 1e-2


def test_weight_only_linears_beside_quantized_inputs(tmp_path):
    """Operands decide, not names: a scheme called fp8 whose input is left alone."""
    layers, state = all_layers("fp8"), tensors_of(TINY, all_layers("fp8"))
    export_hf(write_checkpoint(tmp_path / "a", TINY, layers), tmp_path / "out", dtype="float32")
    down = [name for name in layers if name.endswith("linear_fc2")]
    for name in down:
        layers[name] = replace(layers[name], input=None)
        del state[f"quantizers.{name}.input_scale"]
    checkpoint = write_checkpoint(tmp_path / "b", TINY, layers, tensors=state)
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    modules = [name for name in tensors if name.endswith("_proj.weight")]
    save_file({n: t for n, t in tensors.items() if not n.endswith("down_proj.input_scale")}, file)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    groups["group_1"] = groups["group_0"] | {"input_activations": None}
    names = [name.removesuffix(".weight") for name in modules]
    for number, is_down in (("group_0", False), ("group_1", True)):
        chosen = [name for name in names if name.endswith("down_proj") == is_down]
        groups[number] = groups[number] | {"targets": chosen}
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    report = verify_export(tmp_path / "out", reference=checkpoint, tokens=TOKENS)
    assert report.problems == []
    problems = verify_export(tmp_path / "out", reference=tmp_path / "a").problems  # control
    assert len(problems) == len(down)
    assert all("down_proj: served as fp8 per tensor, trained as fp8" in p for p in problems)

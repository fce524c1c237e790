"""A LoRA adapter is merged into the base that is named, with the same bits in any slice, or refused."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from mqat.checkpoints.adapter import MergedAdapter
from mqat.checkpoints.source import open_pretrained
from mqat.models.decoder import FAMILIES
from tests.unit.checkpoints.malformed_sources import good, write_directory

EVERYTHING = slice(None)
PLAIN = {"peft_type": "LORA", "r": 3, "lora_alpha": 12, "lora_dropout": 0.1, "bias": "none",
         "target_modules": ["q_proj", "down_proj"], "modules_to_save": None, "use_rslora": False,
         "init_lora_weights": True, "rank_pattern": {}, "task_type": "CAUSAL_LM",
         "base_model_name_or_path": "somebody/model"}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:.*was trained on:UserWarning")


@pytest.fixture
def base(tmp_path):
    case = good("llama")
    return write_directory(case, tmp_path / "base"), case.tensors


def adapter(path, tensors, changes=None, more=None):
    """Of every q_proj and down_proj; the parts by the name of the weight."""
    generator, parts, stored = torch.Generator().manual_seed(0), {}, {}
    for name, weight in tensors.items():
        if name.endswith(("q_proj.weight", "down_proj.weight")):
            a = torch.randn(3, weight.shape[1], generator=generator)
            b = torch.randn(weight.shape[0], 3, generator=generator)
            module = f"base_model.model.{name.removesuffix('.weight')}"
            stored |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
            parts[name] = a, b
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(PLAIN | (changes or {})))
    stored |= more or {}
    stored = {name: tensor for name, tensor in stored.items() if tensor is not None}
    save_file(stored, path / "adapter_model.safetensors")
    return parts


@pytest.mark.parametrize(
    ("changes", "scale"), [({}, 4.0), ({"use_rslora": True}, 12 / math.sqrt(3))]
)
def test_an_adapter_is_added_to_the_weights_it_is_of(base, tmp_path, changes, scale):
    path, tensors = base
    parts = adapter(tmp_path / "adapter", tensors, changes)
    with pytest.warns(UserWarning, match="was trained on 'somebody/model'"):
        source = open_pretrained(tmp_path / "adapter", base=path)
    for name, weight in tensors.items():
        found = source.read(name, EVERYTHING, EVERYTHING if weight.dim() > 1 else None)
        if name not in parts:
            assert torch.equal(found, weight)
            continue
        a, b = parts[name]
        torch.testing.assert_close(found, weight + scale * (b @ a), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(found, weight)
        pieces = [source.read(name, slice(r, r + 8), slice(c, c + 4))
                  for r in range(0, 32, 8) for c in range(0, 32, 4)]  # fmt: skip
        rows = [torch.cat(pieces[i : i + 8], 1) for i in range(0, 32, 8)]
        assert torch.equal(torch.cat(rows), found[:32, :32])
    assert source.tokenizer_source == path


@pytest.mark.parametrize(("changes", "message"), [
    ({"use_dora": True}, "use_dora=True"), ({"bias": "all"}, "bias='all'"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save="), ({"peft_type": "IA3"}, "peft_type='IA3'"),
    ({"rank_pattern": {"q_proj": 8}}, "rank_pattern="), ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"), ({"r": 0}, "r=0"),
    ({"r": 4}, "implies|imply"), ({"lora_alpha": "8"}, "lora_alpha='8' is no number"),
])  # fmt: skip
def test_adapters_of_other_kinds_are_refused(base, tmp_path, changes, message):
    path, tensors = base
    adapter(tmp_path / "adapter", tensors, changes)
    with pytest.raises(ValueError, match=message):
        open_pretrained(tmp_path / "adapter", base=path)


@pytest.mark.parametrize(("more", "message"), [
    ({"base_model.model.model.embed_tokens.weight": torch.ones(40, 32)}, "imply no such tensor"),
    ({"base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": None}, "none: it is missing"),
    ({"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(3, 32)}, "does not have"),
    ({"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(3, 31)}, "imply"),
])  # fmt: skip
def test_adapters_of_other_models_are_refused(base, tmp_path, more, message):
    path, tensors = base
    adapter(tmp_path / "adapter", tensors, more=more)
    with pytest.raises(ValueError, match=message):
        open_pretrained(tmp_path / "adapter", base=path)


def test_an_adapter_alone_is_no_model_and_a_model_no_adapter(base, tmp_path):
    path, tensors = base
    adapter(tmp_path / "adapter", tensors)
    with pytest.raises(ValueError, match=r"no model by itself; .*mqat import ADAPTER --base BASE"):
        open_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"is no adapter .*leave out --base"):
        open_pretrained(path, base=path)
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "x.bin")
    with pytest.raises(ValueError, match="missing, truncated or not safetensors"):
        open_pretrained(tmp_path / "adapter", base=path)


def test_a_family_with_transposed_weights_is_refused(tmp_path):
    base = SimpleNamespace(
        path=tmp_path,
        config=SimpleNamespace(architecture=FAMILIES["gpt2"]),
        tokenizer_source=tmp_path,
    )
    with pytest.raises(
        ValueError, match="adapters of gpt2 models, whose weights are stored transposed"
    ):
        MergedAdapter(tmp_path, base)

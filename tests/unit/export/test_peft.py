"""A PEFT directory: bit for bit the checkpoint's adapters; on its base the training model's logits."""

import dataclasses
import json
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file

from mqat.config import ModelConfig
from mqat.errors import UserError
from mqat.export.export import export_checkpoint, export_hf
from mqat.export.exporter import ExportOptions
from mqat.export.exporters import exporter
from mqat.models.adapters import Adapters
from mqat.models.structure import DENSE_LINEARS, in_layer
from mqat.specs.policy import Policy
from tests.unit.model_fixtures import MODEL, microbatches

WEIGHTS = "adapter_model.safetensors"
NAMES = tuple(in_layer(i, x.name) for i in range(2) for x in DENSE_LINEARS)
TOKENS = microbatches()[0]["tokens"]


@pytest.fixture
def exported(world, tmp_path):
    """`exported(algorithm, names)`: base and adapter directories, the checkpoint, and its logits."""
    from torch.distributed import group

    from mqat.calibration.calibrate import calibrate
    from mqat.checkpoints.dist_checkpoint import save_checkpoint
    from mqat.checkpoints.pretrained import load_pretrained_
    from mqat.checkpoints.random_weights import RandomWeights
    from mqat.evaluation.forward import logits
    from mqat.parallel.add_adapters import adapters_of, add_adapters_
    from mqat.specs.model import build_model

    def make(algorithm="null", names=NAMES):
        layers = Policy(algorithm, 64).schemes(MODEL)
        chunks = build_model(MODEL, ModelConfig(), layers, torch.float32)
        load_pretrained_(chunks, RandomWeights(MODEL, 1, 0.1))
        adapters = Adapters(names, 4, 8.0)
        add_adapters_(chunks, adapters)
        calibrate(chunks, lambda: None, group=group.WORLD)
        for adapter in adapters_of(chunks).values():
            adapter.linear_out.data.normal_(std=0.1)
        checkpoint, base, out = (tmp_path / name for name in ("ckpt", "base", "adapter"))
        save_checkpoint(checkpoint, chunks, model=MODEL, layers=layers, algorithm=algorithm,
                        adapters=adapters)  # fmt: skip
        with pytest.warns(UserWarning, match="its adapters are not part of a directory of hf"):
            export_hf(checkpoint, base, dtype="float32")
        export_checkpoint(exporter("peft"), checkpoint, out, ExportOptions())
        return base, out, checkpoint, logits(chunks, TOKENS)

    return make


def verified(found, **changes):
    from mqat.verify.verify import verify_adapter

    base, out, checkpoint, expected = found
    given = {"base": base, "reference": checkpoint, "tokens": TOKENS, "reference_logits": expected}
    return verify_adapter(out, **given | changes)


@pytest.mark.parametrize("algorithm", ["null", "int4"])
def test_adapters_on_their_base_give_the_models_logits(exported, algorithm):
    found = exported(algorithm)
    report = verified(found)
    assert report.ok and report.mean_kl < 1e-6 and report.compared_with_checkpoint
    assert f"equal to the checkpoint {found[2]}" in report.headline()
    config = json.loads((found[1] / "adapter_config.json").read_text())
    assert config["target_modules"] == [
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj",
    ]  # fmt: skip
    export_checkpoint(exporter("peft"), found[2], found[1], ExportOptions(), overwrite=True)


def test_every_tensor_is_compared(exported):
    found = exported(names=(NAMES[0], NAMES[-1]))
    assert verified(found).ok
    config = json.loads((found[1] / "adapter_config.json").read_text())
    assert "model.layers.0.self_attn.q_proj" in config["target_modules"]
    tensors = load_file(found[1] / WEIGHTS)
    for name in tensors:
        wrong = tensors | {name: tensors[name] * (1 + 1e-3)}
        save_file(wrong, found[1] / WEIGHTS)
        (problem,) = verified(found).problems
        assert name.removeprefix("base_model.model.").removesuffix(".weight") in problem
    q, v = (f"base_model.model.model.layers.0.self_attn.{x}_proj.lora_B.weight" for x in "kv")
    save_file(tensors | {q: tensors[v], v: tensors[q]}, found[1] / WEIGHTS)
    assert len(verified(found).problems) == 2
    save_file({n: t for n, t in tensors.items() if n != q}, found[1] / WEIGHTS)
    assert "needs lora_A (4, in) and lora_B (out, 4)" in verified(found).problems[0]
    save_file(tensors, found[1] / WEIGHTS)
    for key, value in (("lora_alpha", 4.0), ("use_rslora", True), ("target_modules", ["q_proj"])):
        (found[1] / "adapter_config.json").write_text(json.dumps(config | {key: value}))
        assert not verified(found).ok
    wrong = verified(found, reference=None, base=found[1])
    assert not wrong.ok


def test_another_strength_gives_other_logits(exported):
    """Control: the decoder really adds them."""
    found = exported()
    path = found[1] / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 8.0', '"lora_alpha": 8.5'))
    assert "logits differ" in verified(found, reference=None).problems[0]


def test_imported_and_merged_it_is_the_same_function(exported):
    from mqat.checkpoints.pretrained import load_pretrained_
    from mqat.checkpoints.source import open_pretrained
    from mqat.evaluation.forward import logits
    from mqat.specs.model import build_model

    base, out, _, expected = exported()
    chunks = build_model(MODEL, ModelConfig(), {}, torch.float32)
    load_pretrained_(chunks, open_pretrained(out, base=base))
    torch.testing.assert_close(logits(chunks, TOKENS), expected, rtol=1e-3, atol=1e-4)


def test_peft_loads_it_on_the_base(exported):
    if find_spec("peft") is None:
        pytest.skip("peft is not installed (pip install mqat[peft]): nothing to compare with")
    import transformers
    from peft import PeftModel

    base, out, _, expected = exported()
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    plain = model(TOKENS).logits
    with torch.no_grad():
        found = PeftModel.from_pretrained(model, out)(TOKENS).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert (plain - expected).abs().max() > 0.1  # control


def test_checkpoints_without_adapters_beside_the_weights_are_refused(exported, tmp_path):
    *_, checkpoint, _ = exported()
    description = json.loads((checkpoint / "mqat.json").read_text())
    description["adapters"]["is_merged"] = True
    (checkpoint / "mqat.json").write_text(json.dumps(description))
    for target in ("peft", "hf"):
        with pytest.raises(UserError, match=r"quantized with the weights|not merged yet"):
            export_checkpoint(exporter(target), checkpoint, tmp_path / "x", ExportOptions())


def test_layouts_and_transposed_models_are_refused():
    from mqat.models.decoder import DecoderConfig

    peft = exporter("peft")
    with pytest.raises(UserError, match="adapters are whole"):
        peft.check(MODEL, {}, ExportOptions(tensor_parallel=2))
    gpt2 = DecoderConfig(
        vocab_size=64, hidden_size=64, intermediate_size=256, num_layers=1, num_attention_heads=2,
        num_query_groups=2, head_dim=32, tie_word_embeddings=True, family="gpt2",
        biases=tuple(x.name for x in DENSE_LINEARS),
    )  # fmt: skip
    with pytest.raises(UserError, match="transposed"):
        peft.check(dataclasses.replace(gpt2), {}, ExportOptions())

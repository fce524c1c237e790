"""Every dense family: transformers' numbers all the way round, unquantized and quantized.

A random model of transformers is imported, described, trained for a step, saved, exported and read by
transformers and by `mqat verify`.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unit.models.hf_models import CASES, hf_gradients, imported, transformers_model
from tests.unit.verify.exports import rewrite

LENGTH, LIMIT = 40, 1e-3  # float32, other summation order
# What TensorRT-LLM's checkpoints have no keys for.
UNSAID = {
    "starcoder2-window": "sliding_window=7",
    "phi3-longrope-tied": "longrope",
    "chatglm-mqa": "head_dim=24",
}


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 97, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def batch(tokens):
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return {
        "tokens": tokens, "labels": tokens, "loss_mask": torch.ones(tokens.shape),
        "position_ids": positions, "attention_mask": None,
    }  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_model_is_the_same_for_transformers_for_training_and_as_exported(
    name, world, tmp_path, tokens
):
    from transformers import AutoModelForCausalLM

    from mqat.checkpoints.describe import describe_model
    from mqat.checkpoints.dist_checkpoint import save_checkpoint
    from mqat.checkpoints.hf_config import decoder_config
    from mqat.evaluation.forward import logits
    from mqat.export.export import export_hf, export_trtllm
    from mqat.models.decoder import DecoderConfig
    from mqat.verify.verify import open_export, verify_export

    hf = transformers_model(name)
    hf.save_pretrained(tmp_path / "hf")
    description, chunk = imported(tmp_path / "hf")
    output = hf(tokens, labels=tokens)
    expected = output.logits.detach()
    found = logits([chunk], tokens)
    assert (found - expected).abs().max() <= LIMIT
    assert (found[:, 1:] - expected[:, :-1]).abs().max() > 10 * LIMIT  # control

    labels = torch.nn.functional.pad(tokens[:, 1:], (0, 1))
    losses = chunk(tokens, torch.arange(LENGTH).expand_as(tokens), None, labels=labels)
    loss = losses[:, :-1].mean()
    torch.testing.assert_close(loss, output.loss, rtol=1e-5, atol=1e-5)
    loss.backward()
    output.loss.backward()
    gradients = hf_gradients(description, chunk)
    for key, parameter in hf.named_parameters():
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(
            gradients.pop(key), parameter.grad, rtol=1e-3, atol=1e-4 * scale, msg=key
        )
    assert not gradients

    # Of models that compute the same the first is found: Llama for Phi-3.
    described = describe_model([chunk]).to_dict() | {"family": description.family}
    assert DecoderConfig.from_dict(described | {"token_ids": description.token_ids}) == description
    assert decoder_config(description.to_hf("float32")) == description
    save_checkpoint(tmp_path / "c", [chunk], model=description, layers={}, algorithm=None)
    export_hf(tmp_path / "c", tmp_path / "out", dtype="float32")
    stored, written = (load_file(tmp_path / d / "model.safetensors") for d in ("hf", "out"))
    stored.pop("transformer.rotary_pos_emb.inv_freq", None)
    assert stored.keys() == written.keys()
    assert all(torch.equal(written[key], tensor) for key, tensor in stored.items())
    if not name.startswith("chatglm"):
        served = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        with torch.no_grad():
            assert (served(tokens).logits - expected).abs().max() <= 1e-6
    assert (open_export(tmp_path / "out").logits(tokens) - expected).abs().max() <= LIMIT
    assert verify_export(tmp_path / "out", reference=tmp_path / "c").problems == []
    if name in UNSAID:
        with pytest.raises(ValueError, match=f"format=trtllm: .*{UNSAID[name]}"):
            export_trtllm(tmp_path / "c", tmp_path / "engine", tensor_parallel=1)
        return
    tp = 2
    export_trtllm(
        tmp_path / "c",
        tmp_path / "engine",
        tensor_parallel=tp,
        pipeline_parallel=2,
        dtype="float32",
    )
    assert (open_export(tmp_path / "engine").logits(tokens) - expected).abs().max() <= LIMIT
    assert verify_export(tmp_path / "engine", reference=tmp_path / "c").problems == []

    def exchange(tensors):
        for key in [key for key in tensors if key.endswith(".input_layernorm.weight")]:
            tensors[key] -= 1

    rewrite(tmp_path / "engine", 0, exchange)  # control: a norm that is stored less one
    problems = verify_export(tmp_path / "engine", reference=tmp_path / "c").problems
    assert any("input_layernorm.weight is not the checkpoint's" in problem for problem in problems)


QUANTIZED = (
    "gemma", "nemotron", "nemotron-biased-tied", "starcoder2", "phi3", "gpt2", "gpt2-untied",
    "chatglm",
)  # fmt: skip


@pytest.mark.parametrize("algorithm", ["int8", "fp8_pc_pt"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_what_is_quantized_is_served_as_trained(name, algorithm, world, tmp_path, tokens):
    from megatron.core import parallel_state

    from mqat.calibration.calibrate import calibrate
    from mqat.checkpoints.dist_checkpoint import save_checkpoint
    from mqat.checkpoints.huggingface import HuggingFaceCheckpoint
    from mqat.evaluation.forward import evaluate, logits
    from mqat.export.export import export_hf, export_trtllm
    from mqat.specs.policy import Policy
    from mqat.verify.verify import verify_export

    transformers_model(name).save_pretrained(tmp_path / "hf")
    layers = Policy(algorithm).schemes(HuggingFaceCheckpoint(tmp_path / "hf").config)
    description, chunk = imported(tmp_path / "hf", layers)
    group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    calibrate([chunk], lambda: evaluate([chunk], [[batch(tokens)]]), group=group)
    trained = logits([chunk], tokens)
    save_checkpoint(tmp_path / "c", [chunk], model=description, layers=layers, algorithm=algorithm)
    how = {"reference": tmp_path / "c", "tokens": tokens, "reference_logits": trained}
    for tp in (1, 2):
        out = tmp_path / f"engine{tp}"
        export_trtllm(tmp_path / "c", out, tensor_parallel=tp, dtype="float32")
        assert verify_export(out, **how).problems == []
    if description.linears[0].is_transposed_in_hf:
        with pytest.raises(ValueError, match=r"transposed \(Conv1D\).*use export.format=trtllm"):
            export_hf(tmp_path / "c", tmp_path / "out")
        return
    export_hf(tmp_path / "c", tmp_path / "out", dtype="float32")
    assert verify_export(tmp_path / "out", **how).problems == []
    with pytest.raises(AssertionError):  # control: quantization shows in the logits
        torch.testing.assert_close(trained, transformers_model(name)(tokens).logits)


@pytest.mark.parametrize("name", ["gemma-biased-mqa-untied", "nemotron-biased-tied", "gpt2"])
def test_rescaled_inputs_keep_the_function_with_every_kind_of_norm(name, world, tmp_path, tokens):
    """Zero-centred norms and biases take their part of SmoothQuant's factors."""
    from mqat.calibration.smoothing_pairs import find_smoothing_pairs
    from mqat.evaluation.forward import logits
    from mqat.models.structure import in_layer

    transformers_model(name).save_pretrained(tmp_path / "hf")
    description, chunk = imported(tmp_path / "hf")
    before = logits([chunk], tokens)
    fed = [x for x in description.linears if x.norm is not None or x.fed_by is not None]
    names = [in_layer(i, x.name) for i in range(2) for x in fed]
    pairs = find_smoothing_pairs([chunk], names, description)
    assert list(pairs) == names and len(fed) == (4 if description.architecture.is_gated else 3)
    generator = torch.Generator().manual_seed(1)
    for pair in pairs.values():
        factors = torch.randn(pair.linear.weight.shape[1], generator=generator).exp()
        pair.fold_(pair.tied(factors))
    assert (logits([chunk], tokens) - before).abs().max() < LIMIT
    next(iter(pairs.values())).before.add_(0.5)  # control
    assert (logits([chunk], tokens) - before).abs().max() > 10 * LIMIT


def test_an_input_that_nothing_before_can_rescale_is_refused_by_name(world, tmp_path):
    from mqat.calibration.check_recipes import check_recipes
    from mqat.checkpoints.huggingface import HuggingFaceCheckpoint
    from mqat.quant.algorithm import Recipe

    transformers_model("gpt2").save_pretrained(tmp_path)
    description = HuggingFaceCheckpoint(tmp_path).config
    name = "decoder.layers.0.mlp.linear_fc2"
    with pytest.raises(ValueError, match=f"{name}: its input comes from an activation"):
        check_recipes({name: Recipe(smoothquant=True)}, {name: None}, description)
    check_recipes({name: Recipe(smoothquant=False)}, {name: None}, description)


def test_gpt2_files_of_the_model_inside_are_read(world, tmp_path, tokens):
    """Published ones have neither the prefix `transformer.` nor a head, but masks."""
    from mqat.evaluation.forward import logits

    hf = transformers_model("gpt2")
    hf.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    inside = {key.removeprefix("transformer."): tensor for key, tensor in stored.items()}
    inside["h.0.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
    assert inside.keys().isdisjoint(stored)
    save_file(inside, tmp_path / "model.safetensors")
    _, chunk = imported(tmp_path)
    with torch.no_grad():
        assert (logits([chunk], tokens) - hf(tokens).logits).abs().max() <= LIMIT


def test_a_tensor_that_stands_twice_is_refused(tmp_path):
    from mqat.checkpoints.huggingface import HuggingFaceCheckpoint

    transformers_model("gpt2").save_pretrained(tmp_path)
    HuggingFaceCheckpoint(tmp_path)  # control
    tensors = load_file(tmp_path / "model.safetensors")
    twice = {"wpe.weight": tensors["transformer.wpe.weight"] + 1}
    save_file(tensors | twice, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"'transformer\.wpe\.weight' and 'wpe\.weight'|'wpe\.weight' and"
    ):
        HuggingFaceCheckpoint(tmp_path)

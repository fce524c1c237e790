"""Scaled rotary positions and windows: transformers' numbers all the way round.

A random model of transformers is imported, described, trained for a step, saved, exported and read by
transformers and by `mqat verify`: logits and gradients are the same everywhere.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mqat.errors import UserError
from mqat.models.structure import EMBEDDING, FINAL_NORM, HF_LAYER

LENGTH, LIMIT = 40, 1e-3  # float32, other summation order
SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "head_dim": 24,
    "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 2.0, "high_freq_factor": 3.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {
    "rope_type": "longrope", "original_max_position_embeddings": 32,
    "short_factor": [1.0 + i / 8 for i in range(12)], "long_factor": [2.0 + i for i in range(12)],
}  # fmt: skip
EAGER = {"attn_implementation": "eager"}  # which caps scores
# Name -> family, keys of its configuration, what a plain model of it would have instead.
CASES = {
    "linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.5}}),
    "dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "yarn": ("Llama", {"rope_parameters": YARN}),
    "yarn, all keys": ("Llama", {"rope_parameters": {
        **YARN, "attention_factor": 0.75, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}}),
    "yarn, two temperatures": ("Qwen3", {"rope_parameters": {
        **YARN, "mscale": 1.0, "mscale_all_dim": 0.5}}),
    "longrope, long": ("Llama", {"rope_parameters": LONG, "original_max_position_embeddings": 32}),
    "longrope, short": ("Llama", {
        "rope_parameters": {**LONG, "original_max_position_embeddings": 48},
        "original_max_position_embeddings": 48}),
    "window of all layers": ("Mistral", {"sliding_window": 7}),
    "window as long as sequences": ("Mistral", {"sliding_window": 64}),
    "window from a layer on": ("Qwen2", {
        "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "gemma 2": ("Gemma2", {
        "sliding_window": 6, "query_pre_attn_scalar": 40, "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0}),
    "gemma 3": ("Gemma3", {
        "sliding_window": 6, "query_pre_attn_scalar": 40, "final_logit_softcapping": 5.0,
        "tie_word_embeddings": True, "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}},
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "gemma 3, a pattern": ("Gemma3", {
        "sliding_window": 6, "query_pre_attn_scalar": 40, "sliding_window_pattern": 2}),
    "windows of a list": ("Qwen3", {
        "use_sliding_window": True, "sliding_window": 5, "tie_word_embeddings": True,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
}  # fmt: skip


def transformers_model(name: str, **changes: object) -> torch.nn.Module:
    import transformers

    family, keys = CASES[name]
    keys = keys | changes
    if "layer_types" in keys:  # in turn, for any number of layers
        count = keys.get("num_hidden_layers", SIZES["num_hidden_layers"])
        keys["layer_types"] = [keys["layer_types"][i % 3] for i in range(count)]
    sizes = SIZES if family != "Qwen2" else {k: v for k, v in SIZES.items() if k != "head_dim"}
    torch.manual_seed(0)
    kind = getattr(transformers, f"{family}{'Text' * (family == 'Gemma3')}Config")
    config = kind(**sizes | keys, **EAGER)
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape)
    return model


def imported(path):
    from mqat.checkpoints.huggingface import HuggingFaceCheckpoint
    from mqat.checkpoints.pretrained import load_pretrained_
    from mqat.config import ModelConfig
    from mqat.specs.model import build_model

    source = HuggingFaceCheckpoint(path)
    (chunk,) = build_model(source.config, ModelConfig(), {}, torch.float32)
    load_pretrained_([chunk], source)
    return source.config, chunk


def hf_gradients(description, chunk):
    """Gradient of every weight by its Hugging Face name."""
    found = {f"{FINAL_NORM.hf}.weight": chunk.decoder.final_layernorm.weight.grad}
    table = chunk.embedding.word_embeddings.weight.grad
    found[f"{EMBEDDING.hf}.weight"] = table[: description.vocab_size]
    for number, layer in enumerate(chunk.decoder.layers):
        prefix = HF_LAYER.format(i=number)
        for linear in description.linears:
            fused = layer.get_submodule(linear.name).weight.grad
            for part, told in enumerate(linear.parts):
                whole = slice(0, description.size(told.rows))
                rows = [fused[own] for own in linear.fused_rows(description, part, whole)]
                found[f"{prefix}{told.hf}.weight"] = torch.cat(rows)
    return found


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 97, (2, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CASES)
def test_a_model_is_the_same_for_transformers_for_training_and_as_exported(
    name, world, tmp_path, tokens
):
    from transformers import AutoModelForCausalLM

    from mqat.checkpoints.describe import describe_model
    from mqat.checkpoints.dist_checkpoint import save_checkpoint
    from mqat.checkpoints.hf_config import decoder_config
    from mqat.evaluation.forward import logits
    from mqat.export.export import export_hf
    from mqat.verify.verify import open_export, verify_export

    hf = transformers_model(name)
    hf.save_pretrained(tmp_path / "hf")
    description, chunk = imported(tmp_path / "hf")
    output = hf(tokens, labels=tokens)
    expected = output.logits.detach()
    found = logits([chunk], tokens)
    assert (found - expected).abs().max() <= LIMIT
    if name != "window as long as sequences" and name != "dynamic":  # which change nothing here
        plain = AutoModelForCausalLM.from_config(without_keys(hf.config), **EAGER).eval()
        plain.load_state_dict(hf.state_dict())
        assert (plain(tokens).logits - expected).abs().max() > 10 * LIMIT  # control

    labels = torch.nn.functional.pad(tokens[:, 1:], (0, 1))
    losses = chunk(tokens, torch.arange(LENGTH).expand_as(tokens), None, labels=labels)
    loss = losses[:, :-1].mean()
    torch.testing.assert_close(loss, output.loss, rtol=1e-5, atol=1e-5)
    loss.backward()
    output.loss.backward()
    grads = hf_gradients(description, chunk)
    for key, parameter in hf.named_parameters():
        if key in grads:
            scale = float(parameter.grad.abs().max())
            torch.testing.assert_close(grads[key], parameter.grad, rtol=1e-3, atol=1e-4 * scale)

    assert describe_model([chunk]) == replace(description, token_ids={})
    assert decoder_config(description.to_hf("float32")) == description
    save_checkpoint(tmp_path / "c", [chunk], model=description, layers={}, algorithm=None)
    export_hf(tmp_path / "c", tmp_path / "out", dtype="float32")
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **EAGER).eval()
    for key, tensor in hf.state_dict().items():
        assert torch.equal(served.state_dict()[key], tensor), key
    assert (served(tokens).logits - expected).abs().max() <= 1e-6
    assert (open_export(tmp_path / "out").logits(tokens) - expected).abs().max() <= LIMIT
    assert verify_export(tmp_path / "out", reference=tmp_path / "c").problems == []


def without_keys(config):
    """The same configuration without what the case is about."""
    changed = type(config).from_dict(config.to_dict())
    if hasattr(config, "query_pre_attn_scalar"):
        changed.query_pre_attn_scalar = config.head_dim
        return changed
    changed.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
    changed.sliding_window = None
    if hasattr(changed, "layer_types"):
        changed.layer_types = ["full_attention"] * config.num_hidden_layers
    return changed


@pytest.mark.parametrize(
    "name", ["yarn", "longrope, long", "window of all layers", "gemma 2", "gemma 3"]
)
def test_what_tensorrt_llm_cannot_say_is_refused_before_work(name, world, tmp_path):
    from mqat.checkpoints.dist_checkpoint import save_checkpoint
    from mqat.export.export import export_trtllm

    transformers_model(name).save_pretrained(tmp_path / "hf")
    description, chunk = imported(tmp_path / "hf")
    save_checkpoint(tmp_path / "c", [chunk], model=description, layers={}, algorithm=None)
    what = {"window of all layers": "sliding_window=7", "gemma 2": "sliding_window=6"}.get(
        name, "rope_scaling of"
    )
    with pytest.raises(UserError, match=f"format=trtllm: {what}.* use export.format=hf"):
        export_trtllm(tmp_path / "c", tmp_path / "out", tensor_parallel=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["linear", "dynamic", "llama3", "window as long as sequences", "gemma 3, a pattern"]
)
def test_tensorrt_llm_is_told_the_scalings_that_it_has(name, world, tmp_path, tokens):
    from mqat.checkpoints.dist_checkpoint import save_checkpoint
    from mqat.export.export import export_trtllm
    from mqat.verify.verify import open_export, verify_export

    hf = transformers_model(name)
    hf.save_pretrained(tmp_path / "hf")
    description, chunk = imported(tmp_path / "hf")
    save_checkpoint(tmp_path / "c", [chunk], model=description, layers={}, algorithm=None)
    export_trtllm(tmp_path / "c", tmp_path / "out", tensor_parallel=2, dtype="float32")
    with torch.no_grad():
        expected = hf(tokens).logits
    assert (open_export(tmp_path / "out").logits(tokens) - expected).abs().max() <= LIMIT
    assert verify_export(tmp_path / "out", reference=tmp_path / "c").problems == []

"""Mixtures of experts from Hugging Face: logits and gradients of transformers, both forms of tensors."""

import json
import shutil
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import load_file, save_file

from mqat.checkpoints.huggingface import HuggingFaceCheckpoint
from mqat.config import ModelConfig
from mqat.errors import UserError

TOKENS = torch.randint(0, 301, (2, 25), generator=torch.Generator().manual_seed(1))
SIZES = {
    "vocab_size": 301, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "initializer_range": 0.2, "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}, "num_experts_per_tok": 2,
}  # fmt: skip
# Grouped and single key/value heads, tied and not, head sizes of their own, biases, both softmax orders.
MODELS = {
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_key_value_heads": 2}),
    "mixtral-mqa-tied": (
        "mixtral",
        {"num_local_experts": 5, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {"num_experts": 6, "num_experts_per_tok": 3, "head_dim": 24, "moe_intermediate_size": 40,
         "num_key_value_heads": 2, "norm_topk_prob": False},
    ),
    "qwen3_moe-biased": (
        "qwen3_moe",
        {"num_experts": 4, "head_dim": 16, "moe_intermediate_size": 32, "num_key_value_heads": 4,
         "norm_topk_prob": True, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "qwen3_moe-dense": (
        "qwen3_moe",
        {"num_experts": 4, "head_dim": 16, "moe_intermediate_size": 32, "num_key_value_heads": 2,
         "decoder_sparse_step": 2},
    ),
    "qwen2_moe": (
        "qwen2_moe",
        {"num_experts": 6, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 80,
         "num_key_value_heads": 2},
    ),
    "qwen2_moe-dense-unbiased": (
        "qwen2_moe",
        {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48,
         "num_key_value_heads": 4, "norm_topk_prob": True, "qkv_bias": False, "mlp_only_layers": [1],
         "tie_word_embeddings": True},
    ),
    "glm4_moe": (
        "glm4_moe",
        {"n_routed_experts": 8, "moe_intermediate_size": 40, "num_key_value_heads": 2, "head_dim": 24,
         "n_group": 4, "topk_group": 1, "n_shared_experts": 2, "use_qk_norm": True,
         "routed_scaling_factor": 1.7},
    ),
    "glm4_moe-plain": (
        "glm4_moe",
        {"n_routed_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 32,
         "num_key_value_heads": 1, "head_dim": 16, "first_k_dense_replace": 0, "attention_bias": True,
         "tie_word_embeddings": True},
    ),
}  # fmt: skip


def random_model(which):
    """A model of transformers; norms, biases and routers moved off their start."""
    import transformers

    torch.manual_seed(0)
    name, own = MODELS[which]
    kind = {"mixtral": "Mixtral", "qwen3_moe": "Qwen3Moe", "qwen2_moe": "Qwen2Moe",
            "glm4_moe": "Glm4Moe"}[name]  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**deepcopy(SIZES | own))
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for key, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape)
        if key.endswith("mlp.gate.weight"):
            parameter.data = 0.3 * torch.randn(parameter.shape)
    for key, buffer in model.named_buffers():
        if key.endswith("e_score_correction_bias"):
            buffer.data = 0.3 * torch.randn(buffer.shape)
    return model


@pytest.fixture(scope="module", params=MODELS)
def huggingface(request, tmp_path_factory):
    """A random model and its directory."""
    model, path = random_model(request.param), tmp_path_factory.mktemp("hf") / request.param
    model.save_pretrained(path)
    return model, path


def built(path):
    from mqat.checkpoints.pretrained import load_pretrained_
    from mqat.specs.model import build_model

    source = HuggingFaceCheckpoint(path)
    chunks = build_model(source.config, ModelConfig(), {}, torch.float32)
    load_pretrained_(chunks, source)
    return chunks


def fused_directory(model, path, out, *, gradients=False):
    """The directory with tensors as transformers 5 computes with them, or with their gradients."""
    shutil.copytree(path, out, ignore=lambda *_: ["model.safetensors"])
    tied = model.config.tie_word_embeddings
    tensors = {
        name: (parameter.grad if gradients else parameter.detach()).clone().contiguous()
        for name, parameter in model.named_parameters()
        if not (tied and name == "lm_head.weight")
    }
    assert any(tensor.dim() == 3 for tensor in tensors.values())
    tensors |= {n: b.clone() for n, b in model.named_buffers() if n.endswith("correction_bias")}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_logits_are_those_of_transformers_from_either_form(huggingface, world, tmp_path):
    from mqat.evaluation.forward import logits

    model, path = huggingface
    with torch.no_grad():
        expected = model(TOKENS).logits
    for directory in (path, fused_directory(model, path, tmp_path / "fused")):
        found = logits(built(directory), TOKENS)
        assert float((found - expected).abs().max()) < 1e-3
        assert float(expected.abs().max()) > 1


def test_gradients_of_a_step_are_those_of_transformers(huggingface, world, tmp_path):
    """Its gradients are read like weights, into a second model."""
    model, path = huggingface
    inputs, labels = TOKENS[:, :-1], TOKENS[:, 1:]
    model.zero_grad()
    F.cross_entropy(model(inputs).logits.flatten(0, 1), labels.flatten()).backward()
    (chunk,) = built(path)
    positions = torch.arange(inputs.shape[1]).expand_as(inputs)
    chunk(inputs, positions, None, labels=labels).mean().backward()
    (wanted,) = built(fused_directory(model, path, tmp_path / "gradients", gradients=True))
    for (name, own), expected in zip(chunk.named_parameters(), wanted.parameters(), strict=True):
        error = (own.grad - expected.detach()).norm() / expected.detach().norm().clamp_min(1e-12)
        assert error.item() < 1e-3, name


def test_a_directory_comes_back_bit_by_bit(huggingface, world, tmp_path):
    from mqat.checkpoints.describe import describe_model
    from mqat.checkpoints.dist_checkpoint import save_checkpoint
    from mqat.data.packaged import python_docs_documents
    from mqat.data.tokenizer import train_small_tokenizer
    from mqat.export.export import export_hf

    _, path = huggingface
    source = HuggingFaceCheckpoint(path)
    tokenizer = train_small_tokenizer(python_docs_documents()[:1], 300)
    chunks = built(path)
    assert describe_model(chunks).num_experts == source.config.num_experts
    save_checkpoint(
        tmp_path / "ckpt",
        chunks,
        layers={},
        algorithm=None,
        model=source.config,
        tokenizer=tokenizer,
    )
    export_hf(tmp_path / "ckpt", tmp_path / "out", dtype="float32")
    before, after = (load_file(d / "model.safetensors") for d in (path, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = HuggingFaceCheckpoint(
        tmp_path / "out"
    ).config  # which has the tokenizer's special tokens
    assert replace(again, token_ids={}) == replace(source.config, token_ids={})


def told(path, tmp_path, **changes):
    copy = shutil.copytree(path, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text()) | changes
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_local_experts": 3}, "has shape|have no place|contradict each other|is not honoured"),
        ({"num_experts": 3}, "has shape|contradict each other|is not honoured"),
        ({"num_experts_per_tok": 9}, "a token cannot go to more experts than there are"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok is None, must be an integer"),
        ({"router_jitter_noise": 0.1}, "router_jitter_noise=0.1 is not honoured"),
        ({"output_router_logits": True}, "output_router_logits=True is not honoured"),
    ],
)
def test_what_a_config_says_of_experts_is_honoured_or_refused(
    huggingface, tmp_path, changes, message
):
    with pytest.raises(UserError, match=message):
        HuggingFaceCheckpoint(told(huggingface[1], tmp_path, **changes))


@pytest.mark.parametrize(
    ("which", "changes", "message"),
    [
        ("mixtral", {"mlp_only_layers": [1]}, "mlp_only_layers=.1. is not honoured"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "layers.0.mlp.gate_proj.weight' is missing"),
        ("qwen3_moe", {"mlp_only_layers": [2]}, "must be a list of numbers of 2 layers"),
        ("qwen2_moe", {"mlp_only_layers": [0, 1]}, "a mixture has experts somewhere"),
        ("qwen2_moe", {"use_sliding_window": True}, "use_sliding_window=True is not honoured"),
        (
            "qwen2_moe",
            {"layer_types": ["sliding_attention"] * 2},
            "layer_types=.*but sliding_window",
        ),
        ("qwen2_moe", {"shared_expert_intermediate_size": 0}, "must be an integer of at least 1"),
        ("qwen2_moe", {"n_shared_experts": 1}, "n_shared_experts=1 is not honoured"),
        ("glm4_moe", {"norm_topk_prob": False}, "divides sigmoid scores .* by their sum, always"),
        ("glm4_moe", {"topk_group": 2}, "chosen by the sum of their best two scores"),
        ("glm4_moe", {"n_group": 3}, "num_experts=8 must be cut evenly"),
        ("glm4_moe", {"n_shared_experts": 3}, "has shape"),
        ("glm4_moe", {"num_local_experts": 8}, "num_local_experts=8 is not honoured"),
        ("glm4_moe", {"use_qk_norm": False}, "have no place"),
        ("glm4_moe", {"routed_scaling_factor": 0}, "must be a positive number"),
        (
            "glm4_moe",
            {"first_k_dense_replace": 0},
            "layers.0.mlp.experts.0.gate_proj.weight' is missing",
        ),
        ("glm4_moe", {"num_nextn_predict_layers": -1}, "must be an integer of at least 0"),
    ],
)
def test_what_shared_experts_and_corrected_routers_cannot_be_is_refused(
    tmp_path, which, changes, message
):
    random_model(which).save_pretrained(tmp_path / which)
    HuggingFaceCheckpoint(tmp_path / which)  # control: it reads as it is
    with pytest.raises(UserError, match=message):
        HuggingFaceCheckpoint(told(tmp_path / which, tmp_path, **changes))


def test_layers_that_predict_further_tokens_are_left_out_with_a_warning(tmp_path):
    random_model("glm4_moe").save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    tensors = {n: t.clone() for n, t in load_file(file).items()}
    further = {
        n.replace("layers.1.", "layers.2."): t.clone()
        for n, t in tensors.items()
        if "layers.1." in n
    }
    file.unlink()
    save_file(tensors | further, file)
    with pytest.warns(UserWarning, match=r"tensors of layers after the 2 .* 'model\.layers\.2\."):
        HuggingFaceCheckpoint(tmp_path / "hf")
    copy = told(tmp_path / "hf", tmp_path, num_nextn_predict_layers=0)
    with pytest.raises(UserError, match=r"has tensors of 3 layers, config\.json says 2"):
        HuggingFaceCheckpoint(copy)


def test_a_missing_expert_and_one_too_many_are_named(huggingface, tmp_path):
    _, path = huggingface
    copy = shutil.copytree(path, tmp_path / "copy")
    tensors = {n: t.clone() for n, t in load_file(copy / "model.safetensors").items()}
    (copy / "model.safetensors").unlink()  # which is still mapped
    name = next(n for n in tensors if ".experts.2." in n)
    other = {n: t for n, t in tensors.items() if n != name}
    save_file(other, copy / "model.safetensors")
    with pytest.raises(UserError, match=f"tensor '{name}' is missing"):
        HuggingFaceCheckpoint(copy)
    save_file(
        tensors | {name.replace(".2.", ".9."): tensors[name].clone()}, copy / "model.safetensors"
    )
    with pytest.raises(UserError, match=r"experts\.9\..*have no place"):
        HuggingFaceCheckpoint(copy)

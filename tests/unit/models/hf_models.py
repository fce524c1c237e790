"""Tiny random models of transformers of the dense families, and gradients by transformers' names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GPT2_SIZES = {
    "vocab_size": 97, "n_embd": 60, "n_inner": 96, "n_layer": 2, "n_head": 4, "n_positions": 64,
    "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
HALF = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}
LONG = {
    "rope_type": "longrope", "rope_theta": 5000.0, "original_max_position_embeddings": 32,
    "short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [2.0 + i for i in range(8)],
}  # fmt: skip
# Name -> class without `ForCausalLM`, keys of its configuration.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma": ("Gemma", {"head_dim": 24}),
    "gemma-biased-mqa-untied": ("Gemma", {
        "head_dim": 24, "num_key_value_heads": 1, "attention_bias": True, "tie_word_embeddings": False}),
    "nemotron": ("Nemotron", {"rope_parameters": HALF}),
    "nemotron-biased-tied": ("Nemotron", {
        "rope_parameters": HALF, "head_dim": 24, "attention_bias": True, "mlp_bias": True,
        "tie_word_embeddings": True}),
    "starcoder2": ("Starcoder2", {"residual_dropout": 0.1}),
    "starcoder2-window": ("Starcoder2", {
        "sliding_window": 7, "use_bias": False, "tie_word_embeddings": False}),
    "phi3": ("Phi3", {"rope_parameters": HALF, "num_key_value_heads": 4}),
    "phi3-longrope-tied": ("Phi3", {
        "rope_parameters": LONG, "original_max_position_embeddings": 32, "tie_word_embeddings": True}),
    "gpt2": ("GPT2", {}),
    "gpt2-untied": ("GPT2", {"n_inner": None, "tie_word_embeddings": False}),
}  # fmt: skip


def transformers_model(name: str) -> torch.nn.Module:
    """A random model whose norms and biases are random, too."""
    import transformers

    kind, keys = CASES[name]
    torch.manual_seed(0)
    sizes = GPT2_SIZES if kind == "GPT2" else SIZES
    config = getattr(transformers, f"{kind}Config")(**sizes | keys)
    head = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    model: torch.nn.Module = getattr(transformers, f"{kind}{head}")(config).float().eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape)
    return model


def imported(path: Path, layers: Any = ()) -> tuple[Any, Any]:
    """A description, and the chunk built from a directory on one rank."""
    from mqat.checkpoints.huggingface import HuggingFaceCheckpoint
    from mqat.checkpoints.pretrained import load_pretrained_
    from mqat.config import ModelConfig
    from mqat.specs.model import build_model

    source = HuggingFaceCheckpoint(path)
    (chunk,) = build_model(source.config, ModelConfig(), dict(layers), torch.float32)
    load_pretrained_([chunk], source)
    return source.config, chunk


def hf_gradients(description: Any, chunk: Any) -> dict[str, Tensor]:
    """Gradient of every parameter by its Hugging Face name."""
    family, found = description.architecture, {}
    for table in description.tables:
        grad = chunk.get_parameter(table.key).grad
        found[f"{table.hf}.weight"] = grad[: description.size(table.rows)]
    for kind in family.norm_kinds:
        last = chunk.get_submodule(family.final_norm.name)
        found[f"{family.final_norm.hf}.{kind}"] = getattr(last, kind).grad
    for number, layer in enumerate(chunk.decoder.layers):
        prefix = family.hf_layer.format(i=number)
        for norm in description.norms:
            for kind in family.norm_kinds:
                module = layer.get_submodule(norm.name)
                found[f"{prefix}{norm.hf}.{kind}"] = getattr(module, kind).grad
        for linear in description.linears:
            module = layer.get_submodule(linear.name)
            for hf, parts in linear.hf_modules().items():
                rows = [
                    rows
                    for part in parts
                    for rows in linear.fused_rows(
                        description, part, slice(0, description.size(linear.parts[part].rows))
                    )
                ]
                weight = torch.cat([module.weight.grad[r] for r in rows])
                found[f"{prefix}{hf}.weight"] = weight.t() if linear.is_transposed_in_hf else weight
                if module.bias is not None:
                    found[f"{prefix}{hf}.bias"] = torch.cat([module.bias.grad[r] for r in rows])
    return found

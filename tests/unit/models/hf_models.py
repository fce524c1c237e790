"""Tiny random models of transformers of the dense families, and gradients by transformers' names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
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
    "chatglm": ("ChatGlm", {}),
    "chatglm-mqa": ("ChatGlm", {"multi_query_group_num": 1, "kv_channels": 24}),
}  # fmt: skip


def transformers_model(name: str) -> torch.nn.Module:
    """A random model whose norms and biases are random, too."""
    import transformers

    kind, keys = CASES[name]
    torch.manual_seed(0)
    model: torch.nn.Module
    if kind == "ChatGlm":  # transformers would run the code that comes with it
        model = ChatGlm(CHATGLM | keys)
        for parameter in model.parameters():
            parameter.data *= 2
    else:
        sizes = GPT2_SIZES if kind == "GPT2" else SIZES
        config = getattr(transformers, f"{kind}Config")(**sizes | keys)
        head = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
        model = getattr(transformers, f"{kind}{head}")(config).float().eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape)
    return model


class ChatGlm(torch.nn.Module):
    """ChatGLM 3 from its published formulas, with the names of its checkpoints."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        hidden, inner = config["hidden_size"], config["ffn_hidden_size"]
        heads, groups = config["num_attention_heads"], config["multi_query_group_num"]
        size, linear, module = config["kv_channels"], torch.nn.Linear, torch.nn.Module

        def norm() -> torch.nn.Module:
            return torch.nn.RMSNorm(hidden, eps=config["layernorm_epsilon"])

        top = self.transformer = module()
        top.embedding, top.encoder = module(), module()
        top.embedding.word_embeddings = torch.nn.Embedding(config["padded_vocab_size"], hidden)
        layers = []
        for _ in range(config["num_layers"]):
            layer = module()
            layer.input_layernorm, layer.post_attention_layernorm = norm(), norm()
            layer.self_attention, layer.mlp = module(), module()
            layer.self_attention.query_key_value = linear(hidden, (heads + 2 * groups) * size)
            layer.self_attention.dense = linear(heads * size, hidden, bias=False)
            layer.mlp.dense_h_to_4h = linear(hidden, 2 * inner, bias=False)
            layer.mlp.dense_4h_to_h = linear(inner, hidden, bias=False)
            layers.append(layer)
        top.encoder.layers, top.encoder.final_layernorm = torch.nn.ModuleList(layers), norm()
        top.output_layer = linear(hidden, config["padded_vocab_size"], bias=False)

    def _rotated(self, x: Tensor) -> Tensor:
        """Pairs (2i, 2i + 1) of the first half of a head, as complex numbers; x is [b, s, h, d]."""
        half = x.shape[-1] // 2
        rates = 10000.0 ** -(torch.arange(0, half, 2) / half)
        turns = torch.polar(torch.ones(1), torch.arange(x.shape[1])[:, None] * rates)[:, None]
        pairs = torch.view_as_complex(x[..., :half].unflatten(-1, (-1, 2)).contiguous())
        return torch.cat([torch.view_as_real(pairs * turns).flatten(-2), x[..., half:]], dim=-1)

    def _attention(self, layer: Any, x: Tensor) -> Tensor:
        config, size = self.config, self.config["kv_channels"]
        heads, groups = config["num_attention_heads"], config["multi_query_group_num"]
        fused = layer.query_key_value(x)
        q, k, v = fused.split([heads * size, groups * size, groups * size], dim=-1)
        q, k, v = (part.unflatten(-1, (-1, size)) for part in (q, k, v))
        q, k = self._rotated(q), self._rotated(k)
        k, v = (part.repeat_interleave(heads // groups, dim=2) for part in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / size**0.5
        length = x.shape[1]
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return layer.dense(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Any:
        """Logits, and the mean loss of the next tokens, as models of transformers give them."""
        from types import SimpleNamespace

        x = self.transformer.embedding.word_embeddings(tokens)
        for layer in self.transformer.encoder.layers:
            x = x + self._attention(layer.self_attention, layer.input_layernorm(x))
            first, second = layer.mlp.dense_h_to_4h(layer.post_attention_layernorm(x)).chunk(2, -1)
            x = x + layer.mlp.dense_4h_to_h(torch.nn.functional.silu(first) * second)
        logits = self.transformer.output_layer(self.transformer.encoder.final_layernorm(x))
        loss = None
        if labels is not None:
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            )
        return SimpleNamespace(logits=logits, loss=loss)

    def save_pretrained(self, path: Path) -> None:
        """As the published files are, which name code of their own."""
        path.mkdir(exist_ok=True, parents=True)
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        tensors["transformer.rotary_pos_emb.inv_freq"] = torch.ones(4)
        save_file(tensors, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps(self.config))


CHATGLM = {
    "model_type": "chatglm", "architectures": ["ChatGLMModel"],
    "auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"},
    "add_bias_linear": False, "add_qkv_bias": True, "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True, "bias_dropout_fusion": True, "ffn_hidden_size": 96,
    "fp32_residual_connection": False, "hidden_dropout": 0.0, "hidden_size": 64, "kv_channels": 16,
    "layernorm_epsilon": 1e-5, "multi_query_attention": True, "multi_query_group_num": 2,
    "num_attention_heads": 4, "num_layers": 2, "original_rope": True, "padded_vocab_size": 97,
    "post_layer_norm": True, "rmsnorm": True, "seq_length": 64, "use_cache": True,
    "torch_dtype": "float32", "tie_word_embeddings": False, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


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

"""GGUF files of families whose norms llama.cpp stores otherwise, or whose MLP has no gate."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.unit.models.hf_models import transformers_model

NAMES = {
    "gemma-biased-mqa-untied": {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"},
    "starcoder2": {"c_fc": "ffn_up", "c_proj": "ffn_down"},
}  # fmt: skip
COMMON = {
    "embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_gguf(path, model, tensors, names):
    """As llama.cpp's converter, which stores what Gemma's norms multiply by."""
    from gguf import GGUFWriter

    family = model.architecture
    writer = GGUFWriter(path, family.gguf_architecture)
    writer.add_context_length(model.max_position_embeddings)
    writer.add_embedding_length(model.hidden_size)
    writer.add_block_count(model.num_layers)
    writer.add_feed_forward_length(model.intermediate_size)
    writer.add_head_count(model.num_attention_heads)
    writer.add_head_count_kv(model.num_query_groups)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    if family.normalization == "LayerNorm":
        writer.add_layer_norm_eps(model.rms_norm_eps)
    else:
        writer.add_layer_norm_rms_eps(model.rms_norm_eps)
    writer.add_rope_freq_base(model.rope_theta)
    for name, tensor in tensors.items():
        is_norm = "norm.weight" in name and "layernorm.bias" not in name
        value = tensor.float() + 1 if is_norm and family.zero_centered_gamma else tensor.float()
        kind = name.rsplit(".", 1)[1]
        stem = next(new for old, new in (COMMON | names).items() if old in name)
        layer = f"blk.{name.split('.')[2]}." if name.startswith("model.layers.") else ""
        writer.add_tensor(f"{layer}{stem}.{kind}", np.ascontiguousarray(value.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", NAMES)
def test_a_gguf_file_is_read_as_the_model_it_was_made_from(name, tmp_path):
    pytest.importorskip("gguf", reason="pip install 'mqat[demo]' to read GGUF files")
    from mqat.checkpoints.gguf import GgufCheckpoint
    from mqat.checkpoints.huggingface import HuggingFaceCheckpoint

    transformers_model(name).save_pretrained(tmp_path)
    model = HuggingFaceCheckpoint(tmp_path).config
    tensors = load_file(tmp_path / "model.safetensors")
    write_gguf(tmp_path / "model.gguf", model, tensors, NAMES[name])
    source = GgufCheckpoint(tmp_path / "model.gguf")
    for field in ("family", "biases", "head_dim", "num_query_groups", "tie_word_embeddings"):
        assert getattr(source.config, field) == getattr(model, field), field
    assert source.config.rms_norm_eps == pytest.approx(model.rms_norm_eps)
    for key, tensor in tensors.items():
        columns = (slice(None),) * (tensor.dim() - 1)
        read = source.read(key, slice(None), *columns)
        assert torch.allclose(read, tensor, atol=1e-6), key

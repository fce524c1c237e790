"""GGUF files of mixtures: experts of a layer in one tensor, read slice by slice."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mqat.checkpoints.huggingface import HuggingFaceCheckpoint
from mqat.errors import UserError
from mqat.models.hf_keys import hf_shapes
from tests.unit.checkpoints.test_experts import random_model

pytest.importorskip("gguf", reason="pip install 'mqat[demo]' to read GGUF files")

NAMES = {
    "embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
    "q_norm": "attn_q_norm", "k_norm": "attn_k_norm", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "moe.gate": "ffn_gate_inp", "mlp.gate": "ffn_gate_inp",
}  # fmt: skip
PARTS = {
    "w1": "ffn_gate_exps", "w3": "ffn_up_exps", "w2": "ffn_down_exps", "gate_proj": "ffn_gate_exps",
    "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps",
}  # fmt: skip


def interleaved(weight, heads):
    """As llama.cpp's converter stores query and key rows of Llama."""
    return weight.view(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def stored(source):
    """llama.cpp name -> tensor, of a Hugging Face directory."""
    model, found, experts = source.config, {}, {}
    for name, shape in hf_shapes(model).items():
        tensor = source.read(name, slice(None), *[slice(None)] * (len(shape) - 1)).float()
        layer = f"blk.{name.split('.')[2]}." if name.startswith("model.layers.") else ""
        if ".experts." in name:
            part = name.split(".")[-2]
            experts.setdefault(f"{layer}{PARTS[part]}.weight", []).append(tensor)
            continue
        stem = next(new for old, new in NAMES.items() if f"{old}." in name)
        heads = {"attn_q": model.num_attention_heads, "attn_k": model.num_query_groups}
        if model.family == "mixtral" and stem in heads:
            tensor = interleaved(tensor, heads[stem])
        found[f"{layer}{stem}.{name.rsplit('.', 1)[1]}"] = tensor
    return found | {name: torch.stack(tensors) for name, tensors in experts.items()}


def write(path, source, *, quantized=False, keys=(), change=lambda tensors: None):
    """A file as llama.cpp's converter writes it; `keys` are further ones, whole numbers."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    model = source.config
    writer = GGUFWriter(path, model.architecture.gguf_architecture)
    writer.add_context_length(model.max_position_embeddings)
    writer.add_embedding_length(model.hidden_size)
    writer.add_block_count(model.num_layers)
    writer.add_feed_forward_length(model.intermediate_size)
    if model.family == "qwen3_moe":
        writer.add_expert_feed_forward_length(model.expert_intermediate_size)
    writer.add_expert_count(model.num_experts)
    writer.add_expert_used_count(model.experts_per_token)
    writer.add_head_count(model.num_attention_heads)
    writer.add_head_count_kv(model.num_query_groups)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_layer_norm_rms_eps(model.rms_norm_eps)
    writer.add_rope_freq_base(model.rope_theta)
    for key, value in keys:
        writer.add_uint32(f"{model.architecture.gguf_architecture}.{key}", value)
    tensors = stored(source)
    change(tensors)
    for name, tensor in tensors.items():
        values = np.ascontiguousarray(tensor.numpy())
        if quantized and "_exps" in name:
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Hugging Face checkpoints of tiny mixtures."""
    found = {}
    for name in ("mixtral", "mixtral-mqa-tied", "qwen3_moe-biased", "qwen3_moe"):
        path = tmp_path_factory.mktemp(name)
        random_model(name).save_pretrained(path)
        found[name] = HuggingFaceCheckpoint(path)
    return found


@pytest.mark.parametrize("name", ["mixtral", "mixtral-mqa-tied", "qwen3_moe-biased"])
@pytest.mark.parametrize("quantized", [False, True])
def test_a_file_is_read_as_the_mixture_it_was_made_from(sources, tmp_path, name, quantized):
    from mqat.checkpoints.gguf import GgufCheckpoint

    source = sources[name]
    write(tmp_path / "model.gguf", source, quantized=quantized)
    found = GgufCheckpoint(tmp_path / "model.gguf")
    told = {"rms_norm_eps": found.config.rms_norm_eps, "token_ids": {}, "router_aux_loss_coef": 0.0}
    assert found.config.rms_norm_eps == pytest.approx(source.config.rms_norm_eps)
    assert replace(found.config, **told) == replace(source.config, **told)
    for key, shape in hf_shapes(source.config).items():
        rows = slice(shape[0] // 2, None)  # a slice of an expert's rows, as a rank reads it
        columns = [slice(None)] * (len(shape) - 1)
        expected, read = (x.read(key, rows, *columns) for x in (source, found))
        if quantized and ".experts." in key:
            assert 0 < float((read - expected).abs().max()) < 0.02, key
        else:
            assert torch.equal(read, expected.float()), key


def test_swapped_experts_would_be_noticed(sources, tmp_path):
    from mqat.checkpoints.gguf import GgufCheckpoint

    def swap(tensors):
        tensors["blk.1.ffn_up_exps.weight"] = tensors["blk.1.ffn_up_exps.weight"].flip(0)

    write(tmp_path / "model.gguf", sources["mixtral"], change=swap)
    found, whole = GgufCheckpoint(tmp_path / "model.gguf"), (slice(None), slice(None))
    prefix = "model.layers.1.block_sparse_moe.experts"
    for number in range(4):
        read = found.read(f"{prefix}.{number}.w3.weight", *whole)
        assert torch.equal(
            read, sources["mixtral"].read(f"{prefix}.{3 - number}.w3.weight", *whole)
        )


@pytest.mark.parametrize(
    ("name", "keys", "change", "message"),
    [
        ("qwen3_moe-biased", [("expert_gating_func", 2)], None, "expert_gating_func' is 2"),
        ("qwen3_moe-biased", [("expert_shared_count", 1)], None, "expert_shared_count' is 1"),
        ("mixtral", [], "blk.0.ffn_gate_inp.weight", "ffn_gate_inp.weight' is missing"),
        ("mixtral", [], "blk.1.ffn_down_exps.weight", r"shape \(3, 64, 96\), .*\(4, 64, 96\)"),
    ],
)
def test_other_mixtures_are_refused_by_name(sources, tmp_path, name, keys, change, message):
    from mqat.checkpoints.gguf import GgufCheckpoint

    def damage(tensors):
        if change is not None and "exps" in change:
            tensors[change] = tensors[change][:3]
        elif change is not None:
            del tensors[change]

    write(tmp_path / "model.gguf", sources[name], keys=keys, change=damage)
    with pytest.raises(UserError, match=message):
        GgufCheckpoint(tmp_path / "model.gguf")


def test_a_dense_family_with_experts_is_refused(sources, tmp_path):
    from gguf import GGUFWriter

    from mqat.checkpoints.gguf import GgufCheckpoint

    writer = GGUFWriter(tmp_path / "model.gguf", "qwen2")
    writer.add_expert_count(4)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"qwen2\.expert_count' is 4, which is not honoured"):
        GgufCheckpoint(tmp_path / "model.gguf")

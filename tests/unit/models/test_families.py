"""What configurations say, which models are refused, and biases in files of llama.cpp."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mqat.checkpoints.hf_config import decoder_config
from mqat.checkpoints.huggingface import HuggingFaceCheckpoint
from mqat.checkpoints.random_weights import RandomWeights
from mqat.models.decoder import FAMILIES, DecoderConfig
from mqat.models.hf_keys import hf_shapes
from mqat.models.structure import DENSE_LINEARS

LINEARS = tuple(linear.name for linear in DENSE_LINEARS)

SIZES = {
    "vocab_size": 40, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 8192,
}  # fmt: skip
QKV, PROJ, FC1, FC2 = LINEARS


@pytest.mark.parametrize(
    ("told", "biases"),
    [
        ({"model_type": "llama"}, ()),
        ({"model_type": "llama", "attention_bias": True}, (QKV, PROJ)),
        ({"model_type": "llama", "attention_bias": True, "mlp_bias": True}, LINEARS),
        ({"model_type": "qwen2"}, (QKV,)),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8192}, (QKV,)),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64}, (QKV,)),
        ({"model_type": "mistral", "sliding_window": None}, ()),
        ({"model_type": "mistral", "sliding_window": 8192}, ()),
    ],
)
def test_a_config_says_which_linears_have_biases(told, biases):
    """Windows as long as the longest sequence, or of layers that do not exist, change nothing."""
    model = decoder_config(SIZES | told)
    assert model.biases == biases and model.family == told["model_type"]
    assert DecoderConfig.from_dict(json.loads(json.dumps(model.to_dict()))) == model
    assert decoder_config(model.to_hf("bfloat16")) == model
    with_bias = {key for key in model.checkpoint_shapes() if key.endswith(".bias")}
    assert with_bias == {f"decoder.layers.{linear}.bias" for linear in biases}


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"model_type": "opt"}, "model_type='opt': supported are llama, mistral, qwen2"),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 2}, "layer_types="),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention", "full_attention"]},
         "layer_types="),
        ({"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["full_attention"]},
         "for each of 2 layers"),
        ({"model_type": "qwen2", "hidden_act": "gelu"}, "hidden_act='gelu'"),
    ],
)  # fmt: skip
def test_what_would_be_computed_wrongly_is_refused(told, message):
    with pytest.raises(ValueError, match=message):
        decoder_config(SIZES | told)


def test_biases_that_no_config_could_express_are_refused():
    model = decoder_config(SIZES | {"model_type": "llama"})
    with pytest.raises(ValueError, match="a llama model has them on"):
        replace(model, biases=(QKV,))
    with pytest.raises(ValueError, match="a qwen2 model has them on"):
        replace(model, family="qwen2")
    with pytest.raises(ValueError, match="family='opt': must be one of"):
        replace(model, family="opt")


def tensors_of(model):
    """All tensors of a model under their Hugging Face names."""
    source = RandomWeights(model, 3)
    return {
        name: source.read(name, slice(None), None if "norm" in name or "bias" in name else slice(None))
        for name in hf_shapes(model)
    }  # fmt: skip


def test_tensors_that_would_be_dropped_are_refused(tmp_path):
    """A model whose config.json forgets its biases would load, run, and be wrong."""
    told = SIZES | {"model_type": "llama"}
    biased = decoder_config(told | {"attention_bias": True})
    save_file(tensors_of(biased), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"k_proj.bias' and 7 more tensors have no place"):
        HuggingFaceCheckpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(told | {"attention_bias": True}))
    assert HuggingFaceCheckpoint(tmp_path).config == biased  # control


GGUF_NAMES = {
    "embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_gguf(path, model, tensors, window=None):
    """As llama.cpp's converter: rows of query and key of a Llama model are interleaved."""
    from gguf import GGUFWriter

    architecture = FAMILIES[model.family].gguf_architecture
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(model.max_position_embeddings)
    writer.add_embedding_length(model.hidden_size)
    writer.add_block_count(model.num_layers)
    writer.add_feed_forward_length(model.intermediate_size)
    writer.add_head_count(model.num_attention_heads)
    writer.add_head_count_kv(model.num_query_groups)
    writer.add_layer_norm_rms_eps(model.rms_norm_eps)
    writer.add_rope_freq_base(model.rope_theta)
    if window is not None:
        writer.add_sliding_window(window)
    for name, tensor in tensors.items():
        value = tensor.numpy()
        for part, heads in (
            ("q_proj", model.num_attention_heads),
            ("k_proj", model.num_query_groups),
        ):
            if part in name and architecture == "llama":
                halves = value.reshape(heads, 2, len(value) // heads // 2, *value.shape[1:])
                value = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(value.shape)
        kind = name.rsplit(".", 1)[1]
        stem = next(new for old, new in GGUF_NAMES.items() if old in name)
        layer = f"blk.{name.split('.')[2]}." if name.startswith("model.layers.") else ""
        writer.add_tensor(f"{layer}{stem}.{kind}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("told", [
    {"model_type": "qwen2"}, {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    {"model_type": "llama", "tie_word_embeddings": True},
])  # fmt: skip
def test_gguf_files_with_biases_are_read(told, tmp_path):
    pytest.importorskip("gguf", reason="pip install 'mqat[demo]' to read GGUF files")
    from mqat.checkpoints.gguf import GgufCheckpoint

    model = decoder_config(SIZES | told)
    tensors = tensors_of(model)
    write_gguf(tmp_path / "model.gguf", model, tensors)
    source = GgufCheckpoint(tmp_path / "model.gguf")
    assert source.config == replace(model, rms_norm_eps=source.config.rms_norm_eps)
    for name, tensor in tensors.items():
        if tensor.dim() == 1:
            assert torch.equal(source.read(name, slice(1, 30)), tensor[1:30]), name
        else:
            read = source.read(name, slice(1, 30), slice(0, 32))
            assert torch.equal(read, tensor[1:30, :32]), name
    with pytest.raises(ValueError, match=r"model.layers.1.self_attn.q_proj.weird' is missing"):
        source.read("model.layers.1.self_attn.q_proj.weird", slice(0, 1))


@pytest.mark.parametrize(("window", "is_read"), [(128, False), (1 << 20, True)])
def test_windows_of_gguf_files_that_sequences_outgrow_are_refused(window, is_read, tmp_path):
    pytest.importorskip("gguf", reason="pip install 'mqat[demo]' to read GGUF files")
    from mqat.checkpoints.gguf import GgufCheckpoint

    model = decoder_config(SIZES | {"model_type": "llama"})
    write_gguf(tmp_path / "model.gguf", model, tensors_of(model), window)
    if is_read:
        assert GgufCheckpoint(tmp_path / "model.gguf").config.num_layers == model.num_layers
        return
    with pytest.raises(ValueError, match="sliding_window=128 of a llama model"):
        GgufCheckpoint(tmp_path / "model.gguf")

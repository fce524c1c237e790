"""A Gemma 3 as llama.cpp writes it: weights of norms plus one, five layers of six with a window."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mqat.checkpoints.hf_config import decoder_config
from mqat.errors import UserError
from mqat.models.hf_keys import hf_shapes
from tests.unit.checkpoints.test_positions import EAGER, LIMIT

pytest.importorskip("gguf", reason="pip install 'mqat[demo]' to read GGUF files")
SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 7,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32, "initializer_range": 0.2,
    "max_position_embeddings": 64, "sliding_window": 6, "query_pre_attn_scalar": 32,
}  # fmt: skip
NAMES = {
    "embed_tokens": "token_embd", "model.norm": "output_norm", "q_proj": "attn_q", "k_proj": "attn_k",
    "v_proj": "attn_v", "o_proj": "attn_output", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip


def written(path, model, **more):
    """A file in float32, with the keys that `convert_hf_to_gguf.py` writes."""
    from gguf import GGUFWriter

    config = model.config
    writer = GGUFWriter(path, "gemma3")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(1e6)
    writer.add_sliding_window(config.sliding_window)
    for key, value in more.items():
        getattr(writer, key)(value)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            stem = next(new for old, new in NAMES.items() if f"{old}.weight" in name)
            layer = f"blk.{name.split('.')[2]}." if ".layers." in name else ""
            value = tensor + 1 if "norm" in name else tensor
            writer.add_tensor(f"{layer}{stem}.weight", np.ascontiguousarray(value.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def model():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    model = Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **EAGER)).float().eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data = torch.randn(parameter.shape).mul(8).round() / 8  # exact plus one
    return model


def test_it_is_the_model_that_was_written(model, world, tmp_path):
    from mqat.checkpoints.gguf import GgufCheckpoint
    from mqat.checkpoints.pretrained import load_pretrained_
    from mqat.config import ModelConfig
    from mqat.evaluation.forward import logits
    from mqat.specs.model import build_model

    source = GgufCheckpoint(written(tmp_path / "m.gguf", model))
    wanted = decoder_config(model.config.to_dict())
    assert source.config == replace(
        wanted, token_ids={}, rms_norm_eps=pytest.approx(wanted.rms_norm_eps)
    )
    assert source.config.windowed_layers == (0, 1, 2, 3, 4, 6)
    state = model.state_dict()
    for name, shape in hf_shapes(source.config).items():
        cols = None if len(shape) == 1 else slice(None)
        assert torch.equal(source.read(name, slice(None), cols), state[name]), name
    (chunk,) = build_model(source.config, ModelConfig(), {}, torch.float32)
    load_pretrained_([chunk], source)
    tokens = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(tokens).logits
    assert (logits([chunk], tokens) - expected).abs().max() <= LIMIT


def test_linear_scaling_is_read_and_others_are_refused(model, tmp_path):
    from gguf import RopeScalingType

    from mqat.checkpoints.gguf import GgufCheckpoint

    more = {"add_rope_scaling_type": RopeScalingType.LINEAR, "add_rope_scaling_factor": 8.0}
    config = GgufCheckpoint(written(tmp_path / "m.gguf", model, **more)).config
    assert config.rope_scaling == {"rope_type": "linear", "factor": 8.0}
    assert config.windowed_rope_theta == 10000.0
    more["add_rope_scaling_type"] = RopeScalingType.YARN
    with pytest.raises(UserError, match="rope scaling 'yarn'"):
        GgufCheckpoint(written(tmp_path / "y.gguf", model, **more))

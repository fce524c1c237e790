"""A model is described by what it computes; whatever a description cannot say is refused by name."""

from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from mqat.errors import UserError
from mqat.models.decoder import DecoderConfig
from tests.unit.model_fixtures import MODEL

ROPE = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192}  # fmt: skip
QKV, PROJ, FC1, FC2 = (
    "self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2",
)  # fmt: skip
MODELS = {
    "llama": MODEL,
    "untied": replace(MODEL, tie_word_embeddings=False, rope_theta=5e5, rms_norm_eps=1e-6),
    "llama3": replace(MODEL, rope_theta=5e5, rope_scaling=ROPE),
    "attention biases": replace(MODEL, biases=(QKV, PROJ)),
    "qwen2": replace(MODEL, family="qwen2", biases=(QKV,)),
    "qwen3": replace(MODEL, family="qwen3"),
}


def built(model=MODEL):
    from mqat.config import ModelConfig
    from mqat.specs.model import build_model

    (chunk,) = build_model(model, ModelConfig(), {}, torch.float32)
    with torch.no_grad():
        for parameter in chunk.parameters():
            parameter.fill_(0.5)
    return chunk


def own_model(config=None, qk_layernorm=False, **arguments):
    """A GPTModel as a user's own loop builds it, with Megatron's spec of normal modules."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    from mqat.specs.backend import SdpaAttention
    from mqat.specs.elementwise import Norm
    from mqat.specs.slots import with_slots

    settings = {
        "num_layers": 2, "hidden_size": 128, "ffn_hidden_size": 256, "num_attention_heads": 4,
        "num_query_groups": 2, "normalization": "RMSNorm", "gated_linear_unit": True,
        "activation_func": F.silu, "add_bias_linear": False, "bias_dropout_fusion": False,
        "hidden_dropout": 0.0, "attention_dropout": 0.0, "masked_softmax_fusion": False,
        "qk_layernorm": qk_layernorm,
    }  # fmt: skip
    slots = {"input_layernorm": Norm, "pre_mlp_layernorm": Norm,
             "self_attention.core_attention": SdpaAttention}  # fmt: skip
    if qk_layernorm:
        slots |= {"self_attention.q_layernorm": Norm, "self_attention.k_layernorm": Norm}
    spec = with_slots(get_gpt_layer_local_spec(normalization="RMSNorm"), slots)
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    transformer = TransformerConfig(**settings | (config or {}))
    block = TransformerBlockSubmodules(layer_specs=[spec] * transformer.num_layers, layer_norm=Norm)
    options = {
        "vocab_size": 304, "max_sequence_length": 2048, "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": True,
    }  # fmt: skip
    return GPTModel(transformer, block, **options | arguments)


@pytest.mark.parametrize("name", MODELS)
def test_the_description_of_a_built_model_is_the_one_it_was_built_from(name, world):
    from mqat.checkpoints.describe import describe_model

    found = describe_model([built(MODELS[name])])
    assert found == MODELS[name]
    assert DecoderConfig.from_dict(found.to_dict()) == found


def test_a_model_of_a_users_own_loop_is_described_and_saved_without_a_description(world, tmp_path):
    import mqat

    model = own_model()
    wanted = replace(MODEL, vocab_size=304)
    assert mqat.describe_model(model) == wanted
    mqat.save_checkpoint(tmp_path / "c", [model], layers={}, algorithm=None)
    mqat.save_checkpoint(tmp_path / "c", [model], model=MODEL, layers={}, algorithm=None)


def layer_norms(model):
    for layer in model.decoder.layers:
        layer.pre_mlp_layernorm = nn.LayerNorm(128)


def not_causal(model):
    from megatron.core.transformer.enums import AttnMaskType

    model.decoder.layers[1].self_attention.attn_mask_type = AttnMaskType.no_mask


OWN = {
    "q/k norms": ({"qk_layernorm": True}, None, "qk_layernorm=True"),
    "GeGLU": ({"config": {"activation_func": F.gelu}}, None, "activation_func=gelu"),
    "no gate": ({"config": {"gated_linear_unit": False}}, None, "gated_linear_unit=False"),
    "biases": ({"config": {"add_bias_linear": True}}, None, r"linear_qkv\.bias .* no place"),
    "qkv biases": ({"config": {"add_qkv_bias": True}}, None, r"linear_qkv\.bias .* no place"),
    "LayerNorm": ({"config": {"normalization": "LayerNorm"}}, None, "normalization=LayerNorm"),
    "LayerNorm beside RMSNorm": ({}, layer_norms, r"layer 0: pre_mlp_layernorm \(LayerNorm\)"),
    "zero-centred norms": ({"config": {"layernorm_zero_centered_gamma": True}}, None, "zero_centered"),
    "another eps": ({"config": {"layernorm_epsilon": 1e-6}}, None, "layernorm_epsilon=1e-06"),
    "another base": ({"rotary_base": 500000}, None, "rotary_base or rope_scaling: channel pair"),
    "Llama 3's scaling": ({"rope_scaling": True}, None, "rotary_base or rope_scaling"),
    "half rotated": ({"rotary_percent": 0.5}, None, "16 of 32 channels are rotated"),
    "interpolated": ({"seq_len_interpolation_factor": 2.0}, None, "channel pair 0 turns by 0.5 a token"),
    "interleaved": ({"config": {"rotary_interleaved": True}}, None, "rotary_interleaved=True"),
    "learned positions": ({"position_embedding_type": "learned_absolute"}, None, "'learned_absolute'"),
    "untied head": ({"share_embeddings_and_output_weights": False}, None, "output_weights=False"),
    "softmax scale": ({"config": {"softmax_scale": 0.5}}, None, "softmax_scale=0.5"),
    "fewer groups": ({"config": {"num_query_groups": 4}}, None, "num_query_groups=4"),
    "not causal": ({}, not_causal, "layer 1: attn_mask_type"),
    "a larger table": ({"vocab_size": 3040}, None, "vocab_size=3040"),
    "post-norm residuals": (
        {"config": {"apply_residual_connection_post_layernorm": True}}, None, "post_layernorm=True"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OWN)
def test_a_model_that_its_description_does_not_say_is_not_saved(name, world, tmp_path):
    from mqat.checkpoints.dist_checkpoint import save_checkpoint

    arguments, change, message = OWN[name]
    model = own_model(**arguments)
    if change is not None:
        change(model)
    with pytest.raises(UserError, match=message):
        save_checkpoint(tmp_path / "c", [model], model=MODEL, layers={}, algorithm=None)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("name", ["GeGLU", "LayerNorm beside RMSNorm", "interleaved", "not causal"])
def test_what_no_description_says_is_not_described(name, world):
    from mqat.checkpoints.describe import describe_model

    arguments, change, message = OWN[name]
    model = own_model(**arguments)
    if change is not None:
        change(model)
    with pytest.raises(UserError, match=message):
        describe_model(model)


def test_every_field_of_megatrons_configuration_is_described_harmless_or_plain(world):
    """Each field in turn at another value: what is not on the list of harmless ones is refused."""
    from mqat.specs.config_check import config_differences

    config = built().config
    assert list(config_differences(config, MODEL)) == []
    refused = set()
    for field in fields(config):
        before = getattr(config, field.name)
        object.__setattr__(config, field.name, 7.5)
        refused |= {field.name} if list(config_differences(config, MODEL)) else set()
        object.__setattr__(config, field.name, before)
    assert {
        "hidden_size", "activation_func", "normalization", "qk_layernorm", "num_moe_experts",
        "window_size", "softmax_type", "multi_latent_attention", "attention_output_gate", "fp8",
        "glu_linear_offset",
        "activation_func_clamp_value", "qk_l2_norm", "heterogeneous_block_specs", "no_rope_freq",
        "experimental_attention_variant", "mtp_num_layers", "layernorm_zero_centered_gamma",
    } <= refused  # fmt: skip
    assert not refused & {"bf16", "sequence_parallel", "recompute_granularity", "hidden_dropout"}


def test_specs_are_not_built_for_another_configuration(world):
    from mqat.specs.backend import gpt_layer_spec
    from mqat.specs.gpt import quantize_block_spec, quantize_layer_spec

    config = built().config
    with pytest.raises(UserError, match=r"ffn_hidden_size=256, but it is described with 512"):
        quantize_block_spec(
            gpt_layer_spec(), {}, model=replace(MODEL, intermediate_size=512),
            transformer_config=config, pp_rank=0,
        )  # fmt: skip
    spec = gpt_layer_spec(MODELS["qwen3"].norms)
    with pytest.raises(UserError, match=r"q_layernorm holds a norm of query or key heads"):
        quantize_layer_spec(spec, {}, layer=0, num_shards=2)

"""ChatGLM 3: neighbouring channels of half a head turn, query, key and value are one tensor with biases.

Its tensors are read as they are; the code that comes with them never runs.

Sources: `modeling_chatglm.py` of THUDM/chatglm3-6b, TensorRT-LLM
`models/chatglm/{config,convert,model}.py` (whose `fc` holds the activated branch last).
"""

from dataclasses import replace

from mqat.models.family import Family
from mqat.models.structure import (
    CORE_ATTENTION,
    DENSE_NORMS,
    EMBEDDING,
    FC1,
    FC2,
    FINAL_NORM,
    OUTPUT_LAYER,
    PROJ,
    QKV,
    Linear,
)

_FUSED = "self_attention.query_key_value"


def _in(linear: Linear, module: str) -> Linear:
    return replace(linear, parts=tuple(replace(part, hf=module) for part in linear.parts))


_FC1 = replace(FC1, parts=tuple(replace(part, trtllm="mlp.fc") for part in FC1.parts))

CHATGLM = Family(
    name="chatglm",
    hf_architecture="ChatGLMModel",
    gguf_architecture=None,
    is_interleaved_in_gguf=False,
    trtllm_architecture="ChatGLMModel",
    decoder_types=("chatglm",),
    linears=(
        _in(QKV, _FUSED),
        _in(PROJ, "self_attention.dense"),
        replace(_in(_FC1, "mlp.dense_h_to_4h"), trtllm_order=(1, 0)),
        _in(FC2, "mlp.dense_4h_to_h"),
    ),
    norms=DENSE_NORMS,
    final_norm=replace(FINAL_NORM, hf="transformer.encoder.final_layernorm"),
    embedding=replace(EMBEDDING, hf="transformer.embedding.word_embeddings"),
    output_layer=replace(OUTPUT_LAYER, hf="transformer.output_layer"),
    cache=replace(CORE_ATTENTION, hf="self_attention", hf_parts=(_FUSED, _FUSED)),
    biased=(QKV.name,),
    rotary_fraction=0.5,
    is_rotary_interleaved=True,
    hf_layer="transformer.encoder.layers.{i}.",
    hf_buffers=("rotary_pos_emb.inv_freq",),
    hf_keys={
        "vocab_size": "padded_vocab_size", "intermediate_size": "ffn_hidden_size",
        "num_hidden_layers": "num_layers", "num_key_value_heads": "multi_query_group_num",
        "head_dim": "kv_channels", "rms_norm_eps": "layernorm_epsilon",
        "max_position_embeddings": "seq_length", "hidden_act": None, "rope_theta": None,
        "rope_scaling": None, "rope_parameters": None, "partial_rotary_factor": None,
    },
    head_dim_is_stated=True,
    # What changes its arithmetic by rounding alone, and code that is not needed.
    hf_harmless=(
        "apply_query_key_layer_scaling", "attention_softmax_in_fp32", "bias_dropout_fusion",
        "classifier_dropout", "auto_map", "vocab_size",
    ),
    hf_extra={
        "add_bias_linear": False, "add_qkv_bias": True, "multi_query_attention": True,
        "rmsnorm": True, "post_layer_norm": True, "original_rope": True,
        "apply_residual_connection_post_layernorm": False, "apply_query_key_layer_scaling": True,
        "attention_softmax_in_fp32": True, "fp32_residual_connection": False,
    },
    hf_fixed={"rope_ratio": 1, "quantization_bit": 0, "prefix_projection": False},
    trtllm_activation="swiglu",
    trtllm_biases={},
    trtllm_fraction="rotary_pct",
    trtllm_states_head=False,
    trtllm_extra={
        "chatglm_version": "chatglm3", "add_bias_linear": False, "add_qkv_bias": True,
        "apply_query_key_layer_scaling": False, "apply_residual_connection_post_layernorm": False,
        "rmsnorm": True,
    },
)  # fmt: skip

"""GPT-2 and GPT-3-like: learned positions, LayerNorm, GELU without a gate, biases everywhere.

Sources: transformers `models/gpt2` (whose `Conv1D` holds weights as (in, out)), TensorRT-LLM
`models/gpt/{config,convert,model}.py`.
"""

from dataclasses import replace

from mqat.models.family import Family
from mqat.models.structure import (
    EMBEDDING,
    FINAL_NORM,
    INPUT_NORM,
    MLP_NORM,
    PLAIN_FC1,
    PLAIN_FC2,
    POSITIONS,
    PROJ,
    QKV,
    Linear,
)


def _conv1d(linear: Linear, module: str) -> Linear:
    parts = tuple(replace(part, hf=module) for part in linear.parts)
    return replace(linear, parts=parts, is_transposed_in_hf=True)


LINEARS = (
    _conv1d(QKV, "attn.c_attn"),
    _conv1d(PROJ, "attn.c_proj"),
    _conv1d(PLAIN_FC1, "mlp.c_fc"),
    _conv1d(PLAIN_FC2, "mlp.c_proj"),
)

GPT2 = Family(
    name="gpt2",
    hf_architecture="GPT2LMHeadModel",
    gguf_architecture=None,
    is_interleaved_in_gguf=False,
    trtllm_architecture="GPT2LMHeadModel",
    decoder_types=("gpt2", "gpt"),
    linears=LINEARS,
    norms=(replace(INPUT_NORM, hf="ln_1"), replace(MLP_NORM, hf="ln_2")),
    final_norm=replace(FINAL_NORM, hf="transformer.ln_f"),
    embedding=replace(EMBEDDING, hf="transformer.wte"),
    positions=POSITIONS,
    normalization="LayerNorm",
    activation="gelu_tanh",
    biased=tuple(linear.name for linear in LINEARS),
    hf_layer="transformer.h.{i}.",
    hf_base="transformer.",
    hf_buffers=(".attn.bias", ".attn.masked_bias"),
    hf_keys={
        "hidden_size": "n_embd", "intermediate_size": "n_inner", "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head", "max_position_embeddings": "n_positions",
        "hidden_act": "activation_function", "rms_norm_eps": "layer_norm_epsilon",
        "num_key_value_heads": None, "head_dim": None, "rope_theta": None, "rope_scaling": None,
        "rope_parameters": None,
    },
    hf_defaults={
        "tie_word_embeddings": True, "layer_norm_epsilon": 1e-5, "n_embd": 768, "n_layer": 12,
        "n_head": 12, "n_positions": 1024,
    },
    inner_factor=4,
    may_omit_groups=True,
    hf_activations=("gelu_new", "gelu_pytorch_tanh"),
    # Rates of dropout in pretraining; heads of other tasks; the same number as n_positions.
    hf_harmless=(
        "resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_type", "summary_use_proj",
        "summary_activation", "summary_proj_to_labels", "summary_first_dropout", "n_ctx",
        "reorder_and_upcast_attn",
    ),
    hf_fixed={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    trtllm_activation="gelu",
    trtllm_biases={"bias": QKV.name},
    trtllm_extra={"gpt_variant": "gpt2"},
)  # fmt: skip

"""As `malformed_sources`, of the families that differ more from Llama: mostly changes of config.json."""

from __future__ import annotations

import random
from typing import Any

from mqat.checkpoints.hf_config import decoder_config
from mqat.models.decoder import FAMILIES
from tests.unit.checkpoints.malformed_sources import (
    EXTRA,
    SIZES,
    Case,
    Expected,
    change_keys,
    change_tensors,
    weights,
)
from tests.unit.models.hf_models import CHATGLM

HALF = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}
LONG = {
    "type": "longrope", "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0, 3.0, 4.0, 5.0],
}  # fmt: skip
# Beside the sizes, under Llama's keys where the family has them under others.
NEWER: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 8, "hidden_act": "gelu_pytorch_tanh"},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 16, "sliding_window": 5,
               "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 16, "sliding_window": 5,
                    "rope_local_base_freq": 1000.0, "sliding_window_pattern": 2},
    "nemotron": {"tie_word_embeddings": False, "rope_parameters": HALF, "attention_bias": True},
    "starcoder2": {"use_bias": True, "sliding_window": 5, "norm_type": "layer_norm"},
    "phi3": {"rope_scaling": LONG, "original_max_position_embeddings": 64, "sliding_window": 5,
             "partial_rotary_factor": 1.0, "pad_token_id": 0},
    "gpt2": {"scale_attn_weights": True, "n_ctx": 256, "hidden_act": "gelu_new"},
    "chatglm": {k: v for k, v in CHATGLM.items() if k != "auto_map"},
    "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3_moe": {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                  "head_dim": 8, "norm_topk_prob": True, "decoder_sparse_step": 1},
}  # fmt: skip
OWN: dict[str, list[Any]] = EXTRA | {
    "query_pre_attn_scalar": [16, 4.5, 0, None], "attn_logit_softcapping": [None, 20.0, -1.0],
    "final_logit_softcapping": [None, 20.0], "rope_local_base_freq": [1e6, None],
    "sliding_window_pattern": [0, 1, 3], "_sliding_window_pattern": [3], "use_bias": [True, False],
    "norm_type": ["rms_norm"], "mlp_type": ["gated"], "hidden_activation": [None, "gelu", "silu"],
    "use_bidirectional_attention": [True], "original_max_position_embeddings": [8, 64, 256, "64"],
    "n_inner": [None, 48, 96], "scale_attn_weights": [False], "n_ctx": [7],
    "scale_attn_by_inverse_layer_idx": [True], "reorder_and_upcast_attn": [True],
    "activation_function": ["gelu", "relu"], "num_local_experts": [2, 3], "num_experts": [2, 3],
    "num_experts_per_tok": [1, 3, 4], "norm_topk_prob": [False, None], "decoder_sparse_step": [2],
    "mlp_only_layers": [[0], []], "moe_intermediate_size": [48], "router_jitter_noise": [0.1],
    "output_router_logits": [True], "router_aux_loss_coef": [0.5, -1], "add_bias_linear": [True],
    "add_qkv_bias": [False], "rmsnorm": [False], "post_layer_norm": [False], "rope_ratio": [1, 50],
    "multi_query_attention": [False], "multi_query_group_num": [1, 4], "original_rope": [False],
    "apply_residual_connection_post_layernorm": [True], "fp32_residual_connection": [True],
    "quantization_bit": [4], "pre_seq_len": [8], "prefix_projection": [True],
    "norm_eps": [1e-3], "norm_epsilon": [1e-3], "layer_norm_epsilon": [1e-3], "rms_norm_eps": [1e-3],
    "layernorm_epsilon": [1e-3], "vocab_size": [40, 39],
}  # fmt: skip


def good(family: str) -> Case:
    """A directory as it should be."""
    told = FAMILIES[family]
    values = {**SIZES, **NEWER[family]}
    if family == "chatglm":
        values = {**values, "ffn_hidden_size": 48, "hidden_size": 32, "kv_channels": 8,
                  "padded_vocab_size": 40, "seq_length": 256}  # fmt: skip
    keys = {told.hf_keys.get(key, key): value for key, value in values.items()}
    config = {"model_type": family, **{k: v for k, v in keys.items() if k is not None}}
    if family == "chatglm":
        config = {k: v for k, v in config.items() if k in CHATGLM}
    return Case("unchanged", config, weights(decoder_config(config)))


def family_case(seed: int) -> tuple[str, Case]:
    """Family and case of a seed: one change, sometimes two."""
    draw = random.Random(seed)
    family = draw.choice(list(NEWER))
    case, kinds = good(family), []
    others = {name: None for name in good(draw.choice(list(NEWER))).tensors}
    for _ in range(draw.choice([1, 1, 1, 2])):
        if draw.random() < 0.8:
            change_keys(case, draw, OWN)
        else:
            change_tensors(case, draw, others)
        kinds.append(case.kind)
    case.kind = kinds[0] if len(kinds) == 1 else "two of these"
    return family, case


EXPECTED_NEWER = Expected(good)

"""NeMo 1's `model_config.yaml` of a decoder, with which its GPT model is built and trained on.

Sources: NeMo 2.0 `megatron_gpt_model.py` and `megatron_base_model.py` (what is read, with defaults),
`examples/nlp/language_modeling/conf/megatron_{llama,gpt}_config.yaml` and
`scripts/checkpoint_converters/convert_{llama_hf_to_nemo,nemotron_nemo_to_hf}.py`.
"""

from collections.abc import Mapping
from typing import Any

from mqat.errors import UserError
from mqat.models.decoder import DecoderConfig
from mqat.models.structure import PROJ, QKV

_TARGET = "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel"
# Whose layers NeMo's GPT specs have.
_FAMILIES = ("llama", "mistral", "qwen2", "nemotron", "starcoder2", "gpt2")
# `openai_gelu` makes its gelu one by tanh; 1p: norms multiply by 1 + weight.
_ACTIVATIONS = {"silu": "fast-swiglu", "relu2": "squared-relu", "gelu_tanh": "gelu"}
_NORMS = {
    ("RMSNorm", False): "rmsnorm", ("LayerNorm", False): "layernorm",
    ("LayerNorm", True): "layernorm1p",
}  # fmt: skip
# `apply_rope_scaling` of NeMo's `collections/common/parts/utils.py` has these built in.
_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
_PRECISION = {"bfloat16": "bf16", "float16": 16, "float32": 32}


def check_model(model: DecoderConfig) -> None:
    """Refuses what NeMo 1 has no words for.

    Raises:
        UserError: Names the field, and another format.
    """
    if model.family not in _FAMILIES:
        raise UserError(
            f"export.format=nemo: NeMo 1 builds no {model.family} model; it has {', '.join(_FAMILIES)}. "
            "Use export.format=hf, which NeMo 2 and Megatron-Bridge import."
        )
    if model.sliding_window is not None:
        raise UserError(
            f"export.format=nemo: sliding_window={model.sliding_window} on layers of this model; "
            "NeMo 1's GPT attends to all earlier tokens. Use export.format=hf."
        )
    if model.rope_scaling not in (None, _ROPE):
        raise UserError(
            f"export.format=nemo: rope_scaling={model.rope_scaling}, but NeMo 1 has {_ROPE} built in. "
            "Use export.format=hf."
        )
    everywhere = tuple(linear.name for linear in model.linears)
    if set(model.biases) not in (set(), {QKV.name}, set(everywhere)):
        raise UserError(
            f"export.format=nemo: biases on {list(model.biases)}; NeMo 1 has them on all linears, on "
            f"{QKV.name} alone, or nowhere. Use export.format=hf."
        )


def model_config(model: DecoderConfig, dtype: str, tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """The file's contents, of a model that passed `check_model`."""
    family = model.architecture
    return {
        "target": _TARGET,
        "mcore_gpt": True,
        "transformer_engine": True,
        "megatron_amp_O2": True,
        "precision": _PRECISION[dtype],
        "micro_batch_size": 1,
        "global_batch_size": 8,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "sequence_parallel": False,
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.intermediate_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "kv_channels": model.head_dim,
        "encoder_seq_length": model.max_position_embeddings,
        "max_position_embeddings": model.max_position_embeddings,
        "normalization": _NORMS[family.normalization, family.zero_centered_gamma],
        "layernorm_epsilon": model.rms_norm_eps,
        "activation": _ACTIVATIONS[family.activation],
        "openai_gelu": family.activation == "gelu_tanh",
        "bias": PROJ.name in model.biases,
        "qkv_bias": QKV.name in model.biases,
        "position_embedding_type": "rope" if family.positions is None else "learned_absolute",
        "rotary_percentage": model.rotary_fraction,
        "rotary_base": model.rope_theta,
        "scale_positional_embedding": model.rope_scaling is not None,
        "seq_len_interpolation_factor": None,
        "share_embeddings_and_output_weights": model.tie_word_embeddings,
        "make_vocab_size_divisible_by": _padding(model.vocab_size),
        "transformer_block_type": "pre_ln",
        "attention_type": "multihead",
        "apply_query_key_layer_scaling": False,
        "normalize_attention_scores": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "ffn_dropout": 0.0,
        "init_method_std": 0.02,
        "use_cpu_initialization": False,
        "pre_process": True,
        "post_process": True,
        "persist_layer_norm": True,
        "bias_activation_fusion": False,
        "bias_dropout_add_fusion": False,
        "masked_softmax_fusion": True,
        "gradient_accumulation_fusion": False,
        "activations_checkpoint_granularity": None,
        "fp8": False,
        "dist_ckpt_format": "torch_dist",
        # Transformer Engine's FP8 histories are not in the file, and not needed.
        "dist_ckpt_load_strictness": "log_all",
        "tokenizer": dict(tokenizer),
        "data": {"dataloader_type": "single"},
        "optim": {"name": "distributed_fused_adam", "lr": 1e-5, "weight_decay": 0.01},
    }


def _padding(vocab_size: int) -> int:
    """The largest power of two up to 128 that divides the vocabulary: nothing is padded."""
    return min(vocab_size & -vocab_size, 128)

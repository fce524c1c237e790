"""Configurations of Megatron-LM, Megatron-Bridge, NeMo 1 and NeMo 2 in the words of Megatron-Core.

Sources: Megatron-LM `megatron/training/argument_utils.py` (core_transformer_config_from_args) and
`gpt_builders.py`; NeMo 2.0 `megatron_base_model.py`, `megatron_gpt_model.py` (build_transformer_config,
model_provider_func) and `collections/llm/gpt/model/{base,llama}.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mqat.checkpoints.megatron_config import TrainingConfig
from mqat.errors import UserError
from mqat.specs.rope import MEGATRON_LLAMA3


def _llama3(factor: Any, numbers: Mapping[str, Any] = MEGATRON_LLAMA3) -> dict[str, Any]:
    return {"rope_type": "llama3", "factor": float(factor)} | dict(numbers)


def from_megatron_lm(args: Mapping[str, Any], where: str) -> TrainingConfig:
    """Of the `args` that Megatron-LM saves in `common.pt`."""
    spelled = {
        "layernorm_epsilon": "norm_epsilon", "layernorm_zero_centered_gamma": "apply_layernorm_1p",
        "num_moe_experts": "num_experts", "gated_linear_unit": "swiglu",
        "share_embeddings_and_output_weights": "untie_embeddings_and_output_weights",
        "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
    }  # fmt: skip
    values = dict(args)
    values |= {word: args[own] for word, own in spelled.items() if own in args}
    if "untie_embeddings_and_output_weights" in args:
        values["share_embeddings_and_output_weights"] = not args[
            "untie_embeddings_and_output_weights"
        ]
    if not args.get("group_query_attention", True):
        values["num_query_groups"] = None
    if args.get("use_rotary_position_embeddings"):  # before there was position_embedding_type
        values["position_embedding_type"] = "rope"
    others = [key for key in ("squared_relu", "quick_geglu", "openai_gelu") if args.get(key)]
    if others:
        values["activation_func"], spelled["activation_func"] = True, others[0]
    elif "swiglu" in args:
        values["activation_func"] = "silu" if args["swiglu"] else "gelu"
    scaled = args.get("use_rope_scaling") or None
    scaling = scaled and _llama3(args.get("rope_scaling_factor", 8.0))
    return TrainingConfig(where, values, spelled, scaling)


def from_transformer_config(config: Mapping[str, Any], where: str) -> TrainingConfig:
    """Of `config` in NeMo 2's `model.yaml`, or of `model` in Megatron-Bridge's `run_config.yaml`."""
    values = dict(config)
    values["activation_func"] = _short_name(config.get("activation_func", "not said"))
    values.setdefault("max_position_embeddings", config.get("seq_length"))
    scaling = None
    if config.get("scale_factor") is not None:  # NeMo 2's Llama 3.1 and later
        names = dict(
            zip(
                MEGATRON_LLAMA3,
                ("low_freq_factor", "high_freq_factor", "old_context_len"),
                strict=True,
            )
        )
        numbers = {name: config.get(own, MEGATRON_LLAMA3[name]) for name, own in names.items()}
        scaling = _llama3(config["scale_factor"], numbers)
    elif (switch := config.get("rope_scaling")) not in (None, False, True):
        raise UserError(f"{where}: rope_scaling={switch!r}, must be true or false.")
    elif switch:
        scaling = _llama3(config.get("rope_scaling_factor", 8.0))
    return TrainingConfig(where, values, {}, scaling)


def _short_name(function: Any) -> Any:
    """Last part of the name of a function, in the spellings of both."""
    if isinstance(function, Mapping):
        function = function.get("_target_")
    return function.rsplit(".", 1)[-1] if isinstance(function, str) else function


def from_nemo1(config: Mapping[str, Any], where: str) -> TrainingConfig:
    """Of NeMo 1's `model_config.yaml`; keys that are absent have the defaults of its GPT model."""
    spelled = {
        "max_position_embeddings": "encoder_seq_length", "rotary_percent": "rotary_percentage",
        "add_bias_linear": "bias", "add_qkv_bias": "qkv_bias",
        "activation_func": "activation", "gated_linear_unit": "activation",
    }  # fmt: skip
    activation = str(config.get("activation", "gelu"))
    is_by_tanh = bool(config.get("openai_gelu")) and activation.endswith(("gelu", "geglu"))
    gelu = "openai_gelu" if is_by_tanh else None
    norm = str(config.get("normalization", "layernorm")).lower()
    norms = {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm", "layernorm1p": "LayerNorm"}
    defaults = {
        "layernorm_epsilon": 1e-5, "rotary_base": 10000, "share_embeddings_and_output_weights": True,
        "position_embedding_type": "learned_absolute", "mcore_gpt": False,
    }  # fmt: skip
    values = defaults | dict(config)
    values |= {
        "normalization": norms.get(norm, norm),
        "layernorm_zero_centered_gamma": norm == "layernorm1p"
        or bool(config.get("layernorm_zero_centered_gamma")),
        "activation_func": "silu" if activation.endswith("swiglu") else gelu or activation,
        "gated_linear_unit": activation.endswith("glu"),
        "rotary_percent": config.get("rotary_percentage", 1.0),
        "add_bias_linear": config.get("bias", True),
        "add_qkv_bias": config.get("qkv_bias", False),
        "max_position_embeddings": config.get("encoder_seq_length", 512),
    }
    scaling = _llama3(8.0) if config.get("scale_positional_embedding") else None
    return TrainingConfig(where, values, spelled, scaling)

"""Where Megatron's configuration asks for something else than a model's description says.

Exports and `mqat verify` rebuild a model from its description, so that whatever it does not say would be
lost without a sign. Every field of the configuration is therefore described, harmless, or at the value
of a plain decoder. `checkpoints.describe` does the same for a model that is built.

Sources: Megatron-Core 0.16 to 0.19 `transformer/transformer_config.py`, `model_parallel_config.py`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields
from typing import Any

from mqat.errors import UserError
from mqat.models.decoder import DecoderConfig
from mqat.models.family import Family
from mqat.models.structure import QUERY_NORM
from mqat.specs.activations import find_activation
from mqat.specs.rope import attention_factor, built_attention_factor
from mqat.specs.window import built_windows

# Fields that change no result but its rounding, its random numbers or its speed; or that only count when
# a switch is on which is not in this list (`num_moe_experts`, `fp8`, `fp4`, `mtp_num_layers`, ...).
_HARMLESS_PREFIXES = (
    "tensor_model_parallel", "pipeline_", "virtual_pipeline", "context_parallel", "expert_", "tp_",
    "moe_", "fp8_", "fp4_", "first_last_layers_", "num_layers_at_", "num_layers_in_", "mamba_", "dsa_",
    "linear_", "mtp_loss", "recompute_", "cuda_graph", "cpu_offloading", "_cpu_offloading", "init_",
    "embedding_init", "output_layer_init", "inference_", "cross_entropy", "batch_", "overlap_",
    "cp_comm", "account_for_", "microbatch_group", "wgrad_", "autocast_", "qk_clip", "kitchen_",
)  # fmt: skip
_HARMLESS = {
    "sequence_parallel", "hierarchical_context_parallel_sizes", "max_seqlen_per_dp_cp_rank",
    "perform_initialization", "use_cpu_initialization", "fp16", "bf16", "params_dtype", "timers",
    "finalize_model_grads_func", "grad_scale_func", "no_sync_func", "grad_sync_func", "param_sync_func",
    "deterministic_mode", "enable_autocast", "num_microbatches_with_partial_activation_checkpoints",
    "gradient_accumulation_fusion", "async_tensor_model_parallel_allreduce", "use_te_rng_tracker",
    "delay_wgrad_compute", "variable_seq_lengths", "use_ring_exchange_p2p",
    "deallocate_pipeline_outputs",
    "defer_embedding_wgrad_compute", "barrier_with_L1_time", "attention_backend", "hidden_dropout",
    "attention_dropout", "fp32_residual_connection", "activation_func_fp8_input_store",
    "log_max_attention_logit", "test_mode", "calculate_per_token_loss", "attention_softmax_in_fp32",
    "apply_query_key_layer_scaling", "disable_bf16_reduced_precision_matmul", "bias_activation_fusion",
    "masked_softmax_fusion", "persist_layer_norm", "memory_efficient_layer_norm", "bias_dropout_fusion",
    "apply_rope_fusion", "fused_single_qkv_rope", "distribute_saved_activations",
    "enable_cuda_graph", "external_cuda_graph",
    "clone_scatter_output_in_embedding",
    "disable_parameter_transpose_cache", "config_logger_dir", "flash_decode", "use_te_activation_func",
    "symmetric_ar_type", "use_mamba_mem_eff_path", "mlp_chunks_for_prefill", "transformer_impl",
    "fine_grained_activation_offloading", "offload_modules", "min_offloaded_tensor_size",
    # since 0.17
    "activation_offload_fraction", "delay_offload_until_cuda_graph",
    "delta_offload_bytes_across_pp_ranks", "fine_grained_offloading_max_inflight_offloads",
    "ep_overlap_early_attn_memory_release", "flash_attention_version", "hybrid_context_parallel",
    "high_priority_a2a_comm_stream", "mlp_chunks_for_training", "nccl_all_reduce_for_prefill",
    "tensor_parallel_num_weight_shards", "use_transformer_engine_op_fuser",
    "use_grouped_gemm_for_dense_mlp",
    "add_bias_linear", "add_qkv_bias",  # the biases themselves are compared
    "max_position_embeddings",  # a longest sequence, under rotary embeddings
}  # fmt: skip
# With experts, fields that begin with `moe_` are harmless only if they are among these: how tokens
# travel, and what is added to the loss.
_HARMLESS_OF_EXPERTS = {
    "moe_aux_loss_coeff", "moe_z_loss_coeff",
    "moe_token_dispatcher_type",
    "moe_enable_deepep", "moe_flex_dispatcher_backend", "moe_per_layer_logging", "moe_permute_fusion",
    "moe_router_fusion", "moe_layer_recompute", "moe_token_drop_policy", "moe_router_dtype",
    "moe_deepep_num_sms", "moe_hybridep_num_sms", "moe_extended_tp",
    "moe_router_bias_update_rate", "moe_use_legacy_grouped_gemm", "moe_router_padding_for_fp8",
    "moe_router_padding_for_quantization", "moe_pad_expert_input_to_capacity",
}  # fmt: skip
# Losses alone; others choose experts in a way of their own.
_HARMLESS_BALANCING = {"none", "aux_loss", "seq_aux_loss", "global_aux_loss"}

# Of a description with experts -> of Megatron's configuration.
SIZES_OF_EXPERTS = {
    "num_experts": "num_moe_experts", "experts_per_token": "moe_router_topk",
    "expert_intermediate_size": "moe_ffn_hidden_size",
}  # fmt: skip
# Of a description -> of Megatron's configuration.
SIZES = {
    "hidden_size": "hidden_size", "intermediate_size": "ffn_hidden_size", "num_layers": "num_layers",
    "num_attention_heads": "num_attention_heads", "num_query_groups": "num_query_groups",
    "head_dim": "kv_channels", "rms_norm_eps": "layernorm_epsilon",
}  # fmt: skip


def check_config(config: Any, described: DecoderConfig) -> None:
    """Refuses a configuration that computes something else than the description says.

    Raises:
        UserError: Names the fields with both values.
    """
    refuse(list(config_differences(config, described)))


def refuse(found: Sequence[str]) -> None:
    """Raises a UserError that lists differences, if there are any."""
    if found:
        raise UserError(
            f"model: {'; '.join(found[:5])}. Checkpoint, export and mqat verify know the model by its "
            "description and would compute something else: derive it with mqat.describe_model, or build "
            "the model as described."
        )


def config_differences(config: Any, described: DecoderConfig) -> Iterator[str]:
    """Fields of a `TransformerConfig` that the description does not account for."""
    wanted = {field: getattr(described, name) for name, field in SIZES.items()}
    wanted["qk_layernorm"] = QUERY_NORM in described.norms
    family = described.architecture
    wanted |= {
        "normalization": family.normalization,
        "layernorm_zero_centered_gamma": family.zero_centered_gamma,
        "gated_linear_unit": family.is_gated,
        "rotary_interleaved": family.is_rotary_interleaved,
    }
    if (factor := built_attention_factor(config)) != attention_factor(described):
        yield f"an attention factor (YaRN's) of {factor}, must be {attention_factor(described)}"
    if described.num_experts:
        wanted |= fields_of_experts(described)
    for field in fields(config):
        name, value = field.name, getattr(config, field.name)
        if name == "activation_func":
            if find_activation(config) != family.activation:
                name = getattr(value, "__name__", value)
                yield f"activation_func={name}, must be {family.activation}"
        elif name == "softmax_scale":
            if not is_softmax_scale(value, described):
                yield f"softmax_scale={value}, must be {scale_text(described)}"
        elif name == "window_size":
            yield from _window_differences(config, described)
        elif name == "moe_router_load_balancing_type":
            kinds = value if isinstance(value, list) else [value]
            if described.num_experts and not {*kinds} <= _HARMLESS_BALANCING:
                yield f"{name}={value!r}, must be of {', '.join(sorted(_HARMLESS_BALANCING))}"
        elif name == "window_attn_skip_freq":
            continue  # with window_size
        elif name == "moe_layer_freq" and described.num_experts:
            if built_dense_layers(config) != described.dense_layers:
                yield f"{name}={value}, but layers without experts are {[*described.dense_layers]}"
        elif name in wanted:
            if value != wanted[name]:
                yield f"{name}={value}, but it is described with {wanted[name]}"
        elif name == "rotary_base":
            if value != described.rope_theta:
                yield f"rotary_base={value}, but it is described with {described.rope_theta}"
        elif not changes_no_result(name) or (
            described.num_experts and name.startswith("moe_") and name not in _HARMLESS_OF_EXPERTS
        ):
            plain = field.default
            if field.default_factory is not MISSING:
                plain = field.default_factory()
            if value != plain:
                yield f"{name}={value}, must be {plain}"


def fields_of_experts(model: DecoderConfig) -> dict[str, Any]:
    """Fields of Megatron's configuration that say what a mixture computes, but for `moe_layer_freq`."""
    limits = model.limits_groups
    scale = model.expert_weight_scale
    sizes = {field: getattr(model, name) for name, field in SIZES_OF_EXPERTS.items()}
    return sizes | {
        "moe_router_pre_softmax": not model.normalizes_expert_weights,
        "moe_router_topk_scaling_factor": None if scale == 1 else scale,
        "moe_router_num_groups": model.expert_groups if limits else None,
        "moe_router_group_topk": model.expert_groups_per_token if limits else None,
        "moe_shared_expert_intermediate_size": model.shared_intermediate_size or None,
        **mixture_of_family(model.architecture),
    }


def mixture_of_family(family: Family) -> dict[str, Any]:
    """Those that are the same for all models of a family; none for dense models."""
    if family.mixture is None:
        return {}
    experts = family.mixture.experts
    return {
        "moe_router_score_function": family.mixture.scores,
        "moe_router_enable_expert_bias": experts.router.correction is not None,
        "moe_shared_expert_gate": experts.shared is not None and experts.shared.gate is not None,
    }


def mixture_of(config: Any) -> dict[str, Any]:
    """As `mixture_of_family`, of a configuration of Megatron's."""
    names = (
        "moe_router_score_function", "moe_router_enable_expert_bias", "moe_shared_expert_gate"
    )  # fmt: skip
    return {} if config.num_moe_experts is None else {n: getattr(config, n) for n in names}


def layer_pattern(model: DecoderConfig) -> int | list[int]:
    """Megatron's `moe_layer_freq`: 1, or for each layer whether it has experts."""
    if not model.dense_layers:
        return 1
    return [int(model.has_experts(layer)) for layer in range(model.num_layers)]


def built_dense_layers(config: Any) -> tuple[int, ...]:
    """Layers without experts, by Megatron's `moe_layer_freq`."""
    pattern = config.moe_layer_freq
    if isinstance(pattern, int):
        pattern = [int(layer % pattern == 0) for layer in range(config.num_layers)]
    return tuple(layer for layer, has_experts in enumerate(pattern) if not has_experts)


def changes_no_result(name: str) -> bool:
    """Whether a field of the configuration changes nothing but rounding, randomness, speed, memory."""
    return name in _HARMLESS or name.startswith(_HARMLESS_PREFIXES)


def _window_differences(config: Any, described: DecoderConfig) -> Iterator[str]:
    try:
        size, layers = built_windows(config)
    except (TypeError, ValueError, IndexError) as error:
        yield f"window_size={config.window_size}: {error}"
        return
    wanted = described.sliding_window, described.windowed_layers
    if (size, layers) != wanted:
        yield (
            f"window_size={config.window_size}, a window of {size} tokens in the layers {[*layers]}, "
            f"but it is described with {wanted[0]} in {[*wanted[1]]}"
        )


def is_softmax_scale(value: float | None, described: DecoderConfig) -> bool:
    """Whether scores are scaled as described; None: by 1 / sqrt(head_dim)."""
    found = described.head_dim**-0.5 if value is None else value
    return math.isclose(found, described.score_scale, rel_tol=1e-6)


def scale_text(described: DecoderConfig) -> str:
    """What the scale of scores must be."""
    return str(described.attention_scale or f"None or 1/sqrt({described.head_dim})")


def position_word(family: Family) -> str:
    """Megatron's word for how a family tells positions apart."""
    return "rope" if family.positions is None else "learned_absolute"

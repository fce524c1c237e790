"""`config.json` and `quant_cfg.json` of a TensorRT-LLM checkpoint."""

from collections.abc import Mapping
from typing import Any

from mqat.errors import UserError
from mqat.export.exporter import PRODUCER, ExportOptions
from mqat.export.reshard import InferenceRank
from mqat.export.trtllm.forms import FORMS, NAMING
from mqat.export.trtllm.positions import position_fields
from mqat.models.decoder import DecoderConfig
from mqat.quant.scheme import LinearScheme

# What TensorRT-LLM leaves unquantized; a list in config.json replaces it as a whole.
_NEVER_QUANTIZED = (
    "*lm_head",
    "*router",
    "*vocab_embedding",
    "*position_embedding",
    "*block_embedding",
    "*shared_expert_gate",
)


def is_mixed(layers: Mapping[str, LinearScheme]) -> bool:
    """Whether a model needs `MIXED_PRECISION`: several algorithms, or several group sizes."""
    return len({tuple(FORMS.of(s).options(s).items()) for s in layers.values()}) > 1


def stage_schemes(
    model: DecoderConfig, layers: Mapping[str, LinearScheme], pp: int
) -> dict[str, LinearScheme | None]:
    """Module name -> scheme, valid for every stage.

    Raises:
        UserError: With `pp` > 1 the names are local to a stage, so every stage must agree.
    """
    ranks = (InferenceRank(pp_rank=stage, pp=pp) for stage in range(pp))
    stages = [NAMING.schemes(model, layers, rank.layers(model)) for rank in ranks]
    if any(stage != stages[0] for stage in stages):
        raise UserError(
            f"export.inference_pipeline_parallel={pp}: quantization.rules treat layers of different "
            "stages differently, which TensorRT-LLM cannot express (its layer names restart in "
            "every stage). Export with inference_pipeline_parallel=1."
        )
    return stages[0]


def excluded_modules(
    model: DecoderConfig, layers: Mapping[str, LinearScheme], pp: int
) -> list[str]:
    """Exact module names of linears that a policy left unquantized, after the built-in list."""
    left = [name for name, scheme in stage_schemes(model, layers, pp).items() if scheme is None]
    return [*_NEVER_QUANTIZED, *sorted(left)]


def quant_cfg_json(
    model: DecoderConfig,
    layers: Mapping[str, LinearScheme],
    *,
    pp: int,
    kv_cache: str | None = None,
) -> dict[str, Any] | None:
    """The `quant_cfg.json` of a mixed model; None when `config.json` says it all."""
    if not is_mixed(layers):
        return None
    modules = stage_schemes(model, layers, pp).items()
    return {
        "quant_algo": "MIXED_PRECISION",
        "kv_cache_quant_algo": kv_cache,
        "quantized_layers": {name: FORMS.of(s).options(s) for name, s in modules if s is not None},
    }


def _expert_fields(model: DecoderConfig) -> dict[str, Any]:
    """Keys of a mixture; every rank has a part of every expert, which `mapping` means unless it says."""
    if not model.num_experts:
        return {}
    # Weights of a token's experts: a softmax over all experts (0), or over the token's alone (1).
    moe = {
        "num_experts": model.num_experts,
        "top_k": model.experts_per_token,
        "normalization_mode": int(model.normalizes_expert_weights),
    }
    size = {model.architecture.trtllm_expert_size: model.expert_intermediate_size}
    return {"moe": moe, **size}


def config_json(
    model: DecoderConfig,
    layers: Mapping[str, LinearScheme],
    options: ExportOptions,
    kv_cache: str | None = None,
) -> dict[str, Any]:
    """The `config.json` of a checkpoint directory; `kv_cache` is TensorRT-LLM's name of its format."""
    tp, pp = options.tensor_parallel, options.pipeline_parallel
    quantization: dict[str, Any] = {"quant_algo": None, "kv_cache_quant_algo": kv_cache}
    if is_mixed(layers):
        quantization["quant_algo"] = "MIXED_PRECISION"
    elif layers:
        scheme = next(iter(layers.values()))
        quantization["exclude_modules"] = excluded_modules(model, layers, pp)
        quantization |= FORMS.of(scheme).options(scheme)
    family = model.architecture
    return {
        "producer": PRODUCER,
        "architecture": family.trtllm_architecture,
        **family.trtllm_extra,
        "dtype": options.dtype,
        "logits_dtype": "float32",
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position_embeddings,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_size": model.head_dim,
        "hidden_act": family.trtllm_activation,
        "norm_epsilon": model.rms_norm_eps,
        "qk_layernorm": any(norm.size == "head" for norm in model.norms),
        **{key: linear in model.biases for key, linear in family.trtllm_biases.items()},
        **position_fields(model),
        "use_parallel_embedding": tp > 1,
        "embedding_sharding_dim": 0,
        "share_embedding_table": False,
        **_expert_fields(model),
        "mapping": {"world_size": tp * pp, "tp_size": tp, "pp_size": pp},
        "quantization": quantization,
    }

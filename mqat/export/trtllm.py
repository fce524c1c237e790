"""TensorRT-LLM checkpoints: what each algorithm becomes, what fits, and `config.json`.

Facts of the format (TensorRT-LLM 0.17 to 1.2): `models/modeling_utils.py` and
`quantization/{quantize,layers}.py` of NVIDIA/TensorRT-LLM. Scaling factors multiply when
dequantizing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mqat import __version__
from mqat.errors import UserError
from mqat.export import linears as content
from mqat.export.names import (
    FC1,
    LINEARS,
    QKV,
    ROW_PARALLEL,
    TRTLLM_LAYER,
    TRTLLM_LINEARS,
    linear_of,
)
from mqat.models.decoder import FAMILIES, DecoderConfig
from mqat.quant.granularity import PerGroup
from mqat.quant.scheme import LinearScheme

DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class TrtllmFormat:
    """How TensorRT-LLM serves an algorithm.

    Attributes:
        quant_algo: Its name there.
        tensors: Of each linear: suffix -> content.
        group_sizes: That its group-wise INT4 kernels take; with them come size rules and options.
        is_requantized: The loader quantizes again; the served weights are not the trained ones.
    """

    quant_algo: str
    tensors: Mapping[str, content.Maker]
    group_sizes: tuple[int, ...] = ()
    is_requantized: bool = False


_INT8 = TrtllmFormat(
    "W8A8_SQ_PER_CHANNEL",
    {
        "weight": content.codes,
        "weights_scaling_factor": content.frozen_scale,
        "activation_scaling_factor": content.input_scale,
        "prequant_scaling_factor": content.ones,
    },
)
_INT4_TENSORS = {
    "weight": content.row_pairs,
    "weights_scaling_factor": content.model_scale,
    "prequant_scaling_factor": content.ones,
}
_INT4 = TrtllmFormat("W4A16_AWQ", _INT4_TENSORS, group_sizes=(64, 128))
# A further algorithm is a further row. SmoothQuant and AWQ are folded into weights and norms.
FORMATS = {
    "int8": _INT8,
    "int8_sq": _INT8,
    "fp8": TrtllmFormat(
        "FP8",
        {
            "weight": content.codes,
            "weights_scaling_factor": content.frozen_scale,
            "activation_scaling_factor": content.input_scale,
        },
    ),
    "fp8_pc_pt": TrtllmFormat(
        "FP8_PER_CHANNEL_PER_TOKEN",
        {"weight": content.codes, "per_channel_scale": content.frozen_scale},
    ),
    "int4": _INT4,
    "int4_awq": _INT4,
    "w_int4_sym": _INT4,
    "w4a8_awq": TrtllmFormat(
        "W4A8_AWQ",
        _INT4_TENSORS
        | {
            "weights_scaling_factor_2": content.fp8_range_scale,
            "activation_scaling_factor": content.input_scale,
        },
        group_sizes=(128,),
    ),
    "nvfp4": TrtllmFormat(
        "NVFP4",
        {
            "weight": content.column_pairs,
            "weights_scaling_factor": content.block_scale,
            "weights_scaling_factor_2": content.global_scale,
            "activation_scaling_factor": content.input_global_scale,
        },
    ),
    "int8_wo": TrtllmFormat("W8A16", {"weight": content.dequantized}, is_requantized=True),
}
UNQUANTIZED = {"weight": content.unquantized}

_HF = "or export.format=hf."
_INSTEAD = {
    "int4_w_int8_a": "TensorRT-LLM has no INT4 weights with INT8 activations: use int8 (W8A8), "
    f"w4a8_awq (FP8 activations) or int4 (weight-only), {_HF}",
    "8da4w": "TensorRT-LLM has no INT4 weights with INT8 activations: use int8 (W8A8), w4a8_awq "
    f"(FP8 activations) or int4 (weight-only), {_HF}",
    "int8_pc_pt": "TensorRT-LLM has INT8 activations per token only in plugins that replace whole "
    f"layers: use int8_sq (static), fp8_pc_pt, {_HF}",
    "w_uint4_asym": "TensorRT-LLM's AWQ kernels are used without zero points here: use w_int4_sym or "
    f"int4_awq, {_HF}",
    "mxfp4": "TensorRT-LLM's engines have no MX formats: use nvfp4.",
    "mxfp8": "TensorRT-LLM's engines have no MX formats: use fp8 or fp8_pc_pt.",
    "nf4": "No server of this format reads NF4: use int4_awq.",
}
_REQUANTIZED = (
    "W8A16 checkpoints hold unquantized weights: TensorRT-LLM quantizes them again at load time, "
    "with amax/128 of each output channel on each rank, so the served weights are not the trained "
    "ones."
)
# What TensorRT-LLM leaves unquantized; a list in config.json replaces it as a whole.
_NEVER_QUANTIZED = (
    "*lm_head",
    "*router",
    "*vocab_embedding",
    "*position_embedding",
    "*block_embedding",
    "*shared_expert_gate",
)


def loader_warning(layers: Mapping[str, LinearScheme]) -> str | None:
    """What the user must know about formats that the loader changes, or None."""
    is_changed = any(FORMATS[scheme.name].is_requantized for scheme in layers.values())
    return _REQUANTIZED if is_changed else None


def _group_size(scheme: LinearScheme) -> int | None:
    granularity = scheme.weight.granularity if scheme.weight else None
    return granularity.size if isinstance(granularity, PerGroup) else None


def _options(scheme: LinearScheme) -> dict[str, Any]:
    """The `quantization` entries of a linear, as in a config for a whole model of such linears."""
    served = FORMATS[scheme.name]
    options: dict[str, Any] = {"quant_algo": served.quant_algo}
    if served.group_sizes:
        options |= {
            "group_size": _group_size(scheme),
            "has_zero_point": False,
            "pre_quant_scale": True,
        }
    return options


def is_mixed(layers: Mapping[str, LinearScheme]) -> bool:
    """Whether a model needs `MIXED_PRECISION`: several algorithms, or several group sizes."""
    return len({tuple(_options(scheme).items()) for scheme in layers.values()}) > 1


def _check_algorithms(layers: Mapping[str, LinearScheme], allow_requantization: bool) -> None:
    """Refuses algorithms that the format lacks, alone or in a mixture."""
    names = sorted({scheme.name for scheme in layers.values()})
    for name in names:
        if name not in FORMATS:
            reason = _INSTEAD.get(name, f"exportable algorithms: {sorted(FORMATS)}.")
            raise UserError(f"quantization.algorithm={name} cannot be exported. {reason}")
        if not FORMATS[name].is_requantized:
            continue
        if is_mixed(layers):
            raise UserError(
                f"quantization.rules mix {names}: TensorRT-LLM has no mixture with "
                f"{FORMATS[name].quant_algo}. Use int8, int4 or fp8 instead of {name}."
            )
        if not allow_requantization:
            raise UserError(
                f"quantization.algorithm={name} cannot be exported to TensorRT-LLM exactly. "
                f"{_REQUANTIZED} Use export.format=hf, which keeps them, or int8 or int4; or accept "
                "the second rounding with export.allow_requantization=true "
                "(--allow-requantization)."
            )


def _by_stage(
    model: DecoderConfig, layers: Mapping[str, LinearScheme], pp: int
) -> list[dict[str, LinearScheme | None]]:
    """For each stage: module name, local to it -> scheme."""
    per_stage = model.num_layers // pp
    stages: list[dict[str, LinearScheme | None]] = [{} for _ in range(pp)]
    for layer in range(model.num_layers):
        for linear in LINEARS:
            scheme = layers.get(f"decoder.layers.{layer}.{linear}")
            for module in TRTLLM_LINEARS[linear]:
                name = TRTLLM_LAYER.format(i=layer % per_stage) + module
                stages[layer // per_stage][name] = scheme
    return stages


def _modules(
    model: DecoderConfig, layers: Mapping[str, LinearScheme], pp: int
) -> dict[str, LinearScheme | None]:
    """Module name -> scheme, valid for every stage.

    Raises:
        ValueError: With `pp` > 1 the names are local to a stage, so every stage must agree.
    """
    stages = _by_stage(model, layers, pp)
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
    left = [name for name, scheme in _modules(model, layers, pp).items() if scheme is None]
    return [*_NEVER_QUANTIZED, *sorted(left)]


def check_exportable(
    model: DecoderConfig,
    layers: Mapping[str, LinearScheme],
    *,
    tp: int,
    pp: int,
    allow_requantization: bool = False,
) -> None:
    """Refuses what the format cannot hold; meant to run before training.

    Raises:
        ValueError: Names the setting, the sizes, and what would work.
    """
    for key, size in (("tensor", tp), ("pipeline", pp)):
        if size < 1:
            raise UserError(f"export.inference_{key}_parallel={size}: must be at least 1.")
    heads, groups = model.num_attention_heads, model.num_query_groups
    fits = heads % tp == 0 and model.intermediate_size % tp == 0
    if not fits or (groups % tp and tp % groups):
        raise UserError(
            f"export.inference_tensor_parallel={tp} does not fit num_attention_heads={heads}, "
            f"num_query_groups={groups}, intermediate_size={model.intermediate_size}: it must "
            "divide heads and intermediate size, and divide the groups or be a multiple of them."
        )
    if model.num_layers % pp:
        raise UserError(
            f"export.inference_pipeline_parallel={pp} does not divide num_layers="
            f"{model.num_layers}."
        )
    _check_algorithms(layers, allow_requantization)
    _modules(model, layers, pp)
    for name, scheme in layers.items():
        sizes = FORMATS[scheme.name].group_sizes
        if sizes:
            _check_awq(model, name, _group_size(scheme) or 0, sizes, tp)
        else:
            _check_blocks(model, name, _group_size(scheme), tp)


def _check_awq(
    model: DecoderConfig, name: str, group_size: int, sizes: tuple[int, ...], tp: int
) -> None:
    """TensorRT-LLM's size rule for group-wise INT4 (quantization/layers.py pads otherwise)."""
    if group_size not in sizes:
        allowed = " and ".join(map(str, sizes))
        raise UserError(
            f"{name}: group_size={group_size}; TensorRT-LLM's INT4 kernels support {allowed} only."
        )
    linear = linear_of(name)
    out_features, in_features = model.linear_shape(linear)
    if linear == "self_attention.linear_qkv":
        copies = max(model.num_query_groups, tp)
        out_features = (model.num_attention_heads + 2 * copies) * model.head_dim
    if linear == "mlp.linear_fc1":
        out_features //= 2
    multiple = max(64, group_size) * tp
    for what, size in (("in_features", in_features), ("out_features", out_features)):
        if size % multiple:
            fitting = [g for g in sizes if size % (g * tp) == 0]
            raise UserError(
                f"{name}: {what}={size} is not a multiple of {multiple} (= max(64, group_size="
                f"{group_size}) x export.inference_tensor_parallel={tp}), as TensorRT-LLM's INT4 "
                f"kernels need. Group sizes that fit here: {fitting or 'none at this size'}; or "
                "use a smaller export.inference_tensor_parallel."
            )


def _check_blocks(model: DecoderConfig, name: str, block: int | None, tp: int) -> None:
    """Blocks along the input dimension must not be cut, where ranks hold part of it."""
    linear = linear_of(name)
    width = model.linear_shape(linear)[1]
    parts = tp if linear in ROW_PARALLEL else 1
    if block is not None and width % (block * parts):
        raise UserError(
            f"{name}: in_features={width} is not a multiple of {block * parts} (= blocks of {block} x "
            f"export.inference_tensor_parallel={parts}); use a smaller one, or another algorithm."
        )


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
    modules = _modules(model, layers, pp)
    return {
        "quant_algo": "MIXED_PRECISION",
        "kv_cache_quant_algo": kv_cache,
        "quantized_layers": {
            name: _options(scheme) for name, scheme in modules.items() if scheme is not None
        },
    }


def config_json(
    model: DecoderConfig,
    layers: Mapping[str, LinearScheme],
    *,
    tp: int,
    pp: int,
    dtype: str,
    kv_cache: str | None = None,
) -> dict[str, Any]:
    """The `config.json` of a checkpoint directory; `kv_cache` is TensorRT-LLM's name of its format."""
    quantization: dict[str, Any] = {"quant_algo": None, "kv_cache_quant_algo": kv_cache}
    if is_mixed(layers):
        quantization["quant_algo"] = "MIXED_PRECISION"
    elif layers:
        quantization["exclude_modules"] = excluded_modules(model, layers, pp)
        quantization |= _options(next(iter(layers.values())))
    rotary_scaling = None
    if model.rope_scaling is not None:
        rotary_scaling = {"type": "llama3"} | {
            key: value for key, value in model.rope_scaling.items() if key != "rope_type"
        }
    family = FAMILIES[model.family]
    return {
        "producer": {"name": "mqat", "version": __version__},
        "architecture": family.trtllm_architecture,
        **family.trtllm_extra,
        "dtype": dtype,
        "logits_dtype": "float32",
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position_embeddings,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_size": model.head_dim,
        "hidden_act": "silu",
        "norm_epsilon": model.rms_norm_eps,
        "qk_layernorm": False,
        "attn_bias": QKV in model.biases,
        "mlp_bias": FC1 in model.biases,
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": model.rope_theta,
        "rotary_scaling": rotary_scaling,
        "use_parallel_embedding": tp > 1,
        "embedding_sharding_dim": 0,
        "share_embedding_table": False,
        "mapping": {"world_size": tp * pp, "tp_size": tp, "pp_size": pp},
        "quantization": quantization,
    }

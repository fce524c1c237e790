"""The tensors a TensorRT-LLM directory must contain, derived from its `config.json` alone.

A second opinion as well: nothing here comes from the exporter.
"""

from __future__ import annotations

from dataclasses import dataclass

from mqat.verify.layout import MODULES, ServedConfig

ROW_PARALLEL = ("attention.dense", "mlp.proj")
EMBEDDING = "transformer.vocab_embedding.weight"
LM_HEAD = "lm_head.weight"
FINAL_NORM = "transformer.ln_f.weight"
CACHE_SCALE = "attention.kv_cache_scaling_factor"


@dataclass(frozen=True)
class Expected:
    """Shape, safetensors dtype, and whether every tensor-parallel rank holds the same bytes."""

    shape: tuple[int, ...]
    dtype: str
    is_replicated: bool


def module_of(name: str) -> str:
    """`transformer.layers.3.mlp.fc.weight` -> `mlp.fc`; other names give an empty string."""
    parts = name.split(".")
    return ".".join(parts[3:5]) if name.startswith("transformer.layers.") else ""


def linear_shape(config: ServedConfig, module: str) -> tuple[int, int]:
    """(out, in) of one rank's part of a linear."""
    raw = config.raw
    hidden, d = int(raw["hidden_size"]), int(raw["head_size"])
    heads, branch = config.heads_per_rank, int(raw["intermediate_size"]) // config.tp
    return {
        "attention.qkv": ((heads + 2 * config.key_value_heads_per_rank) * d, hidden),
        "attention.dense": (hidden, heads * d),
        "mlp.fc": (branch, hidden),
        "mlp.gate": (branch, hidden),
        "mlp.proj": (hidden, branch),
    }[module]


def _linear_tensors(config: ServedConfig, prefix: str, module: str) -> dict[str, Expected]:
    out, width = linear_shape(config, module)
    row = module in ROW_PARALLEL
    algorithm = config.algorithm_of(prefix + module)
    dtype = config.dtype
    if algorithm in (None, "W8A16"):
        return {"weight": Expected((out, width), dtype, False)}
    if algorithm == "FP8":
        return {
            "weight": Expected((out, width), "F8_E4M3", False),
            "weights_scaling_factor": Expected((1,), "F32", True),
            "activation_scaling_factor": Expected((1,), "F32", True),
        }
    if algorithm == "W8A8_SQ_PER_CHANNEL":
        return {
            "weight": Expected((out, width), "I8", False),
            "weights_scaling_factor": Expected((out,), "F32", row),
            "activation_scaling_factor": Expected((1,), "F32", True),
            "prequant_scaling_factor": Expected((width,), dtype, not row),
        }
    one = Expected((1,), "F32", True)
    if algorithm == "FP8_PER_CHANNEL_PER_TOKEN":
        return {
            "weight": Expected((out, width), "F8_E4M3", False),
            "per_channel_scale": Expected((out,), "F32", row),
        }
    if algorithm == "NVFP4":
        return {
            "weight": Expected((out, width // 2), "U8", False),
            "weights_scaling_factor": Expected((out, width // 16), "F8_E4M3", False),
            "weights_scaling_factor_2": one,
            "activation_scaling_factor": one,
        }
    groups = width // config.group_size_of(prefix + module)
    tensors = {
        "weight": Expected((out // 2, width), "I8", False),
        "weights_scaling_factor": Expected((out, groups), dtype, False),
        "prequant_scaling_factor": Expected((width,), dtype, not row),
    }
    if algorithm == "W4A8_AWQ":
        tensors |= {"weights_scaling_factor_2": one, "activation_scaling_factor": one}
    return tensors


def expected_tensors(config: ServedConfig, pp_rank: int) -> dict[str, Expected]:
    """Name -> expectation for the rank files of one pipeline stage."""
    hidden = int(config.raw["hidden_size"])
    norm = Expected((hidden,), config.dtype, True)
    table = Expected((config.vocab_per_rank, hidden), config.dtype, False)
    result: dict[str, Expected] = {}
    if pp_rank == 0:
        result[EMBEDDING] = table
    for layer in range(config.layers_per_stage):
        prefix = f"transformer.layers.{layer}."
        result[f"{prefix}input_layernorm.weight"] = norm
        result[f"{prefix}post_layernorm.weight"] = norm
        if config.kv_cache is not None:
            result[prefix + CACHE_SCALE] = Expected((1,), "F32", True)
        for module in MODULES:
            for suffix, expected in _linear_tensors(config, prefix, module).items():
                result[f"{prefix}{module}.{suffix}"] = expected
            if module in config.biased:
                rows, _ = linear_shape(config, module)
                bias = Expected((rows,), config.dtype, module in ROW_PARALLEL)
                result[f"{prefix}{module}.bias"] = bias
    if pp_rank == config.pp - 1:
        result[FINAL_NORM] = norm
        result[LM_HEAD] = table
    return result

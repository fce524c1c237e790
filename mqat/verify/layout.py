"""What a TensorRT-LLM directory must contain, derived from its `config.json` alone.

Written from the format's description, not from the exporter: names, shapes and dtypes here are a second
opinion. Legend: t tensor-parallel size, p pipeline stages, V vocabulary, H hidden, F intermediate.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

_TOP_LEVEL = {
    "producer", "architecture", "dtype", "logits_dtype", "vocab_size", "max_position_embeddings",
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_size", "hidden_act", "norm_epsilon", "qk_layernorm", "attn_bias",
    "mlp_bias", "position_embedding_type", "rotary_base", "rotary_scaling",
    "use_parallel_embedding", "embedding_sharding_dim", "share_embedding_table", "mapping",
    "quantization",
}  # fmt: skip
_QUANTIZATION = {
    "quant_algo", "kv_cache_quant_algo", "group_size", "smoothquant_val", "clamp_val",
    "has_zero_point", "pre_quant_scale", "exclude_modules",
}  # fmt: skip
_BUILT_IN_EXCLUSIONS = ("*lm_head", "*vocab_embedding")
_ALGORITHMS = (None, "FP8", "W8A8_SQ_PER_CHANNEL", "W4A16_AWQ", "W8A16")
SAFETENSORS_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
LINEARS = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj")
ROW_PARALLEL = ("attention.dense", "mlp.proj")


@dataclass(frozen=True)
class Expected:
    """Shape, safetensors dtype, and whether every tensor-parallel rank holds the same bytes."""

    shape: tuple[int, ...]
    dtype: str
    is_replicated: bool


@dataclass(frozen=True)
class ServedConfig:
    """The parts of `config.json` that decide what the files must look like."""

    raw: dict[str, Any]
    tp: int
    pp: int
    algorithm: str | None
    group_size: int
    excluded: tuple[str, ...]

    @property
    def dtype(self) -> str:
        """Safetensors name of the model dtype."""
        return SAFETENSORS_DTYPES[self.raw["dtype"]]

    @property
    def layers_per_stage(self) -> int:
        """Layers in each rank file."""
        return int(self.raw["num_hidden_layers"]) // self.pp

    @property
    def key_value_heads_per_rank(self) -> int:
        """At least one: with more ranks than heads, heads are copied."""
        return max(int(self.raw["num_key_value_heads"]) // self.tp, 1)

    @property
    def vocab_per_rank(self) -> int:
        """Rows of the padded table on each rank."""
        return -(-int(self.raw["vocab_size"]) // self.tp)

    def is_quantized(self, module: str) -> bool:
        """Whether a module such as `transformer.layers.0.mlp.fc` holds quantized tensors."""
        if self.algorithm is None:
            return False
        return not any(fnmatchcase(module, pattern) for pattern in self.excluded)


def read_config(directory: Path, problems: list[str]) -> ServedConfig | None:
    """Parses and checks `config.json`; complaints go to `problems`, None if it is unusable."""
    file = directory / "config.json"
    try:
        raw = json.loads(file.read_text("utf-8"))
        mapping, quantization = raw["mapping"], raw["quantization"]
        tp, pp = int(mapping["tp_size"]), int(mapping["pp_size"])
        for key in (
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "hidden_size",
            "intermediate_size",
            "head_size",
            "vocab_size",
        ):
            if int(raw[key]) < 1:
                raise ValueError(f"{key} must be positive")
    except (OSError, ValueError, KeyError, TypeError) as error:
        problems.append(f"config.json: unreadable or incomplete ({error!r})")
        return None
    before = len(problems)
    for key in sorted(set(raw) - _TOP_LEVEL):
        problems.append(f"config.json: unknown key {key!r}")
    for key in sorted(set(mapping) - {"world_size", "tp_size", "pp_size"}):
        problems.append(f"config.json: unknown key mapping.{key} (the loader raises TypeError)")
    for key in sorted(set(quantization) - _QUANTIZATION):
        problems.append(f"config.json: unknown key quantization.{key} (TypeError in the loader)")
    if mapping.get("world_size") != tp * pp:
        problems.append(f"config.json: mapping.world_size={mapping.get('world_size')} != {tp * pp}")
    required = {
        "architecture": ("LlamaForCausalLM",),
        "dtype": tuple(SAFETENSORS_DTYPES),
        "hidden_act": ("silu",),
        "position_embedding_type": ("rope_gpt_neox",),
    }
    for key, allowed in required.items():
        if raw.get(key) not in allowed:
            problems.append(f"config.json: {key}={raw.get(key)!r}, expected one of {allowed}")
    heads, groups = int(raw["num_attention_heads"]), int(raw["num_key_value_heads"])
    if heads % tp or int(raw["intermediate_size"]) % tp or (groups % tp and tp % groups):
        problems.append(f"config.json: tp_size={tp} does not fit heads {heads}, groups {groups}")
    if int(raw["num_hidden_layers"]) % pp:
        problems.append(f"config.json: pp_size={pp} does not divide num_hidden_layers")
    algorithm = quantization.get("quant_algo")
    if algorithm not in _ALGORITHMS:
        problems.append(f"config.json: quant_algo={algorithm!r} is not verified here")
    excluded = quantization.get("exclude_modules") or list(_BUILT_IN_EXCLUSIONS)
    if algorithm is not None:
        for name in ("lm_head", "transformer.vocab_embedding"):
            if not any(fnmatchcase(name, pattern) for pattern in excluded):
                problems.append(f"config.json: exclude_modules lets {name} be quantized")
    if algorithm == "W4A16_AWQ":
        if quantization.get("pre_quant_scale") is not True:
            problems.append("config.json: W4A16_AWQ needs pre_quant_scale=true")
        if quantization.get("group_size") not in (64, 128):
            problems.append(f"config.json: group_size={quantization.get('group_size')}")
    if len(problems) > before:
        return None
    group_size = int(quantization.get("group_size") or 128)
    return ServedConfig(raw, tp, pp, algorithm, group_size, tuple(excluded))


def linear_shape(config: ServedConfig, module: str) -> tuple[int, int]:
    """(out, in) of one rank's part of a linear."""
    raw, t = config.raw, config.tp
    hidden, d = int(raw["hidden_size"]), int(raw["head_size"])
    heads = int(raw["num_attention_heads"]) // t
    branch = int(raw["intermediate_size"]) // t
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
    algorithm = config.algorithm if config.is_quantized(prefix + module) else None
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
    groups = width // config.group_size
    return {
        "weight": Expected((out // 2, width), "I8", False),
        "weights_scaling_factor": Expected((out, groups), dtype, False),
        "prequant_scaling_factor": Expected((width,), dtype, not row),
    }


def expected_tensors(config: ServedConfig, pp_rank: int) -> dict[str, Expected]:
    """Name -> expectation for the rank files of one pipeline stage."""
    hidden = int(config.raw["hidden_size"])
    norm = Expected((hidden,), config.dtype, True)
    table = Expected((config.vocab_per_rank, hidden), config.dtype, False)
    result: dict[str, Expected] = {}
    if pp_rank == 0:
        result["transformer.vocab_embedding.weight"] = table
    for layer in range(config.layers_per_stage):
        prefix = f"transformer.layers.{layer}."
        result[f"{prefix}input_layernorm.weight"] = norm
        result[f"{prefix}post_layernorm.weight"] = norm
        for module in LINEARS:
            for suffix, expected in _linear_tensors(config, prefix, module).items():
                result[f"{prefix}{module}.{suffix}"] = expected
    if pp_rank == config.pp - 1:
        result["transformer.ln_f.weight"] = norm
        result["lm_head.weight"] = table
    return result

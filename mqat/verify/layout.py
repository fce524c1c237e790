"""What `config.json` of a TensorRT-LLM directory says, checked key by key.

Written from the format's description, not from the exporter: a second opinion.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

MODULES = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj")
SAFETENSORS_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
# Also in a mixture.
_LINEAR_ALGORITHMS = (
    "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "W8A8_SQ_PER_CHANNEL", "W4A16_AWQ", "W4A8_AWQ", "NVFP4",
)  # fmt: skip
INT4_ALGORITHMS = ("W4A16_AWQ", "W4A8_AWQ")
_ALGORITHMS = (None, *_LINEAR_ALGORITHMS, "W8A16", "MIXED_PRECISION")
_CACHES = (None, "INT8", "FP8")
_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_size", "vocab_size", "max_position_embeddings",
)  # fmt: skip
_POSITIVE = ("norm_epsilon", "rotary_base")
# Keys with the values that the reader and the expected table are written for.
_FIXED: dict[str, tuple[Any, ...]] = {
    "architecture": ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"),
    "dtype": tuple(SAFETENSORS_DTYPES),
    "logits_dtype": ("float32", "float16"),
    "hidden_act": ("silu",),
    "position_embedding_type": ("rope_gpt_neox",),
    "qk_layernorm": (False,),
    "attn_bias": (False, True),
    "mlp_bias": (False, True),
    "embedding_sharding_dim": (0,),
    "share_embedding_table": (False,),
}
# What a model class pins down besides, and keys that it alone reads.
_OF_ARCHITECTURE: dict[str, dict[str, tuple[Any, ...]]] = {
    "MistralForCausalLM": {"attn_bias": (False,), "mlp_bias": (False,)},
    "Qwen2ForCausalLM": {
        "attn_bias": (True,),
        "mlp_bias": (False,),
        "qwen_type": ("qwen2",),
        "seq_length": (8192,),
        "use_logn_attn": (False,),
    },
}
_ATTENTION, _MLP = ("attention.qkv", "attention.dense"), ("mlp.fc", "mlp.gate", "mlp.proj")
_OTHER = {"producer", "rotary_scaling", "use_parallel_embedding", "mapping", "quantization"}
_MAPPING = ("world_size", "tp_size", "pp_size")
_QUANTIZATION = {
    "quant_algo", "kv_cache_quant_algo", "group_size", "smoothquant_val", "clamp_val",
    "has_zero_point", "pre_quant_scale", "exclude_modules",
}  # fmt: skip
_ROPE_FACTORS = (
    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
)  # fmt: skip
# What the loader excludes when the file has no list.
_BUILT_IN_EXCLUSIONS = (
    "*lm_head", "*router", "*vocab_embedding", "*position_embedding", "*block_embedding",
    "*shared_expert_gate",
)  # fmt: skip


@dataclass(frozen=True)
class ServedConfig:
    """The parts of `config.json` that decide what the files must look like."""

    raw: dict[str, Any]
    tp: int
    pp: int
    algorithm: str | None
    group_size: int
    excluded: tuple[str, ...]
    mixed: dict[str, dict[str, Any]]

    @property
    def dtype(self) -> str:
        """Safetensors name of the model dtype."""
        return SAFETENSORS_DTYPES[self.raw["dtype"]]

    @property
    def biased(self) -> tuple[str, ...]:
        """Modules with a bias; that of a row-parallel one is added once, after the sum over ranks."""
        attention = _ATTENTION[:1] if "qwen_type" in self.raw else _ATTENTION
        return (attention if self.raw["attn_bias"] else ()) + (_MLP if self.raw["mlp_bias"] else ())

    @property
    def kv_cache(self) -> str | None:
        """`INT8` or `FP8`: format of the key/value cache; None: unquantized."""
        found: str | None = self.raw["quantization"].get("kv_cache_quant_algo")
        return found

    @property
    def layers_per_stage(self) -> int:
        """Layers in each rank file."""
        return int(self.raw["num_hidden_layers"]) // self.pp

    @property
    def heads_per_rank(self) -> int:
        """Query heads of each rank."""
        return int(self.raw["num_attention_heads"]) // self.tp

    @property
    def key_value_heads_per_rank(self) -> int:
        """At least one: with more ranks than heads, heads are copied."""
        return max(int(self.raw["num_key_value_heads"]) // self.tp, 1)

    @property
    def key_value_copies(self) -> int:
        """Consecutive ranks that hold the same key/value head."""
        return max(self.tp // int(self.raw["num_key_value_heads"]), 1)

    @property
    def vocab_per_rank(self) -> int:
        """Rows of the padded table on each rank."""
        return -(-int(self.raw["vocab_size"]) // self.tp)

    def algorithm_of(self, module: str) -> str | None:
        """Algorithm of a module such as `transformer.layers.0.mlp.fc`; None: unquantized."""
        if self.algorithm == "MIXED_PRECISION":
            return self.mixed.get(module, {}).get("quant_algo")
        if any(fnmatchcase(module, pattern) for pattern in self.excluded):
            return None
        return self.algorithm

    def group_size_of(self, module: str) -> int:
        """Elements that share a scale in a group-wise quantized module."""
        return int(self.mixed.get(module, {}).get("group_size", self.group_size))

    def is_quantized(self, module: str) -> bool:
        """Whether a module holds quantized tensors."""
        return self.algorithm_of(module) is not None


def read_config(directory: Path, problems: list[str]) -> ServedConfig | None:
    """Parses and checks `config.json`; complaints go to `problems`, None if it is unusable."""
    try:
        raw = json.loads((directory / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        problems.append(f"config.json: unreadable ({error})")
        return None
    if not isinstance(raw, dict):
        problems.append("config.json: not a JSON object")
        return None
    found = [*_model_problems(raw), *_mapping_problems(raw), *_quantization_problems(raw)]
    mixed: dict[str, dict[str, Any]] = {}
    if not found and raw["quantization"]["quant_algo"] == "MIXED_PRECISION":
        unusable = list(_read_mixed(directory, raw, mixed))
        problems += unusable
        if unusable:
            return None
    if not found:
        quantization = raw["quantization"]
        excluded = quantization.get("exclude_modules")
        config = ServedConfig(
            raw=raw,
            tp=raw["mapping"]["tp_size"],
            pp=raw["mapping"]["pp_size"],
            algorithm=quantization["quant_algo"],
            group_size=quantization.get("group_size", 128),
            excluded=tuple(_BUILT_IN_EXCLUSIONS if excluded is None else excluded),
            mixed=mixed,
        )
        found = list(_size_problems(config))
    problems += [f"config.json: {problem}" for problem in found]
    return None if found else config


def _read_mixed(
    directory: Path, raw: dict[str, Any], mixed: dict[str, dict[str, Any]]
) -> Iterator[str]:
    """Fills `mixed` from `quant_cfg.json`; yields what is wrong with it."""
    name = "quant_cfg.json"
    try:
        found = json.loads((directory / name).read_text("utf-8"))
    except (OSError, ValueError) as error:
        yield f"{name}: unreadable ({error})"
        return
    layers = found.get("quantized_layers") if isinstance(found, dict) else None
    if not isinstance(layers, dict) or found.get("quant_algo") != "MIXED_PRECISION":
        yield f"{name}: expected quant_algo MIXED_PRECISION and quantized_layers"
        return
    cache = raw["quantization"].get("kv_cache_quant_algo")
    if found.get("kv_cache_quant_algo") != cache:
        yield f"{name}: kv_cache_quant_algo is not config.json's ({cache!r})"
    per_stage = raw["num_hidden_layers"] // raw["mapping"]["pp_size"]
    names = {f"transformer.layers.{i}.{m}" for i in range(per_stage) for m in MODULES}
    for module, entry in layers.items():
        if module not in names:
            yield f"{name}: {module} is not a linear of this model"
        elif not isinstance(entry, dict) or entry.get("quant_algo") not in _LINEAR_ALGORITHMS:
            yield f"{name}: {module} needs a quant_algo of {_LINEAR_ALGORITHMS}"
        else:
            yield from (f"{name}: {module}: {text}" for text in _awq_problems(entry))
            mixed[module] = entry


def _awq_problems(entry: dict[str, Any]) -> Iterator[str]:
    """Options that the group-wise INT4 kernels need."""
    algorithm = entry["quant_algo"]
    if algorithm not in INT4_ALGORITHMS:
        return
    for key, allowed in (
        ("pre_quant_scale", (True,)),
        ("has_zero_point", (False,)),
        ("group_size", (64, 128) if algorithm == "W4A16_AWQ" else (128,)),
    ):
        if entry.get(key) not in allowed:
            yield f"quantization.{key}={entry.get(key)!r}, expected one of {allowed}"


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _model_problems(raw: dict[str, Any]) -> Iterator[str]:
    fixed = _FIXED | _OF_ARCHITECTURE.get(str(raw.get("architecture")), {})
    for key in sorted(set(raw) - {*_SIZES, *_POSITIVE, *fixed, *_OTHER}):
        yield f"unknown key {key!r}"
    for key in _SIZES:
        if not _is_size(raw.get(key)):
            yield f"{key}={raw.get(key)!r}, expected a positive integer"
    for key in _POSITIVE:
        if not _is_positive(raw.get(key)):
            yield f"{key}={raw.get(key)!r}, expected a positive number"
    for key, allowed in fixed.items():
        value = raw.get(key)
        if value not in allowed or isinstance(value, bool) != isinstance(allowed[0], bool):
            yield f"{key}={value!r}, expected one of {allowed}"
    scaling = raw.get("rotary_scaling")
    if scaling is None:
        return
    if not isinstance(scaling, dict) or set(scaling) != {"type", *_ROPE_FACTORS}:
        yield f"rotary_scaling={scaling!r}, expected type and {', '.join(_ROPE_FACTORS)}"
    elif scaling["type"] != "llama3" or not all(_is_positive(scaling[k]) for k in _ROPE_FACTORS):
        yield f"rotary_scaling={scaling!r}, expected type llama3 and positive numbers"
    elif scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        yield "rotary_scaling.high_freq_factor must be above low_freq_factor"


def _mapping_problems(raw: dict[str, Any]) -> Iterator[str]:
    mapping = raw.get("mapping")
    if not isinstance(mapping, dict):
        yield f"mapping={mapping!r}, expected an object"
        return
    for key in sorted(set(mapping) - set(_MAPPING)):
        yield f"unknown key mapping.{key} (the loader raises TypeError)"
    for key in _MAPPING:
        if not _is_size(mapping.get(key)):
            yield f"mapping.{key}={mapping.get(key)!r}, expected a positive integer"
            return
    if mapping["world_size"] != mapping["tp_size"] * mapping["pp_size"]:
        yield f"mapping.world_size={mapping['world_size']} is not tp_size x pp_size"
    parallel = raw.get("use_parallel_embedding")
    if parallel is not True and (parallel is not False or mapping["tp_size"] > 1):
        yield f"use_parallel_embedding={parallel!r}, expected true (or false at tp_size 1)"


def _quantization_problems(raw: dict[str, Any]) -> Iterator[str]:
    quantization = raw.get("quantization")
    if not isinstance(quantization, dict) or "quant_algo" not in quantization:
        yield "quantization: expected an object with quant_algo"
        return
    for key in sorted(set(quantization) - _QUANTIZATION):
        yield f"unknown key quantization.{key} (the loader raises TypeError)"
    algorithm = quantization["quant_algo"]
    if algorithm not in _ALGORITHMS:
        yield f"quant_algo={algorithm!r} is not verified here; known are {_ALGORITHMS}"
    cache = quantization.get("kv_cache_quant_algo")
    if cache not in _CACHES:
        yield f"kv_cache_quant_algo={cache!r} is not verified here; known are {_CACHES}"
    yield from _awq_problems(quantization)
    excluded = quantization.get("exclude_modules")
    if algorithm is None or excluded is None:
        return
    if not isinstance(excluded, list) or not all(isinstance(item, str) for item in excluded):
        yield "exclude_modules: expected a list of strings"
        return
    for name in ("lm_head", "transformer.vocab_embedding"):
        if not any(fnmatchcase(name, pattern) for pattern in excluded):
            yield f"exclude_modules lets {name} be quantized"


def _size_problems(config: ServedConfig) -> Iterator[str]:
    """Rules that tie sizes, layout and format together."""
    raw, t = config.raw, config.tp
    heads, groups = raw["num_attention_heads"], raw["num_key_value_heads"]
    branch, hidden, d = raw["intermediate_size"], raw["hidden_size"], raw["head_size"]
    if heads % t or branch % t or (groups % t and t % groups) or heads % groups:
        yield f"tp_size={t} does not fit heads {heads}, key/value heads {groups}, MLP {branch}"
    if raw["num_hidden_layers"] % config.pp:
        yield f"pp_size={config.pp} does not divide num_hidden_layers={raw['num_hidden_layers']}"
    sizes = [entry["group_size"] for entry in config.mixed.values() if "group_size" in entry]
    if config.algorithm == "W4A16_AWQ":
        sizes.append(config.group_size)
    if not sizes:
        return
    multiple = max(64, min(sizes)) * t  # of a mixture, what its smallest groups need
    qkv = (heads + 2 * max(groups, t)) * d
    for name, size in (
        ("qkv", qkv),
        ("hidden", hidden),
        ("attention", heads * d),
        ("MLP", branch),
    ):
        if size % multiple:
            yield f"W4A16_AWQ: {name} size {size} is not a multiple of {multiple}, the loader pads"

"""What `config.json` of a Hugging Face directory says about its tensors, checked key by key.

Written from the formats' descriptions, not from the exporter: a second opinion.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mqat.verify.layout import SAFETENSORS_DTYPES

# Module -> where its rows and columns come from, as config keys (see `HfConfig.size`).
MODULES = {
    "self_attn.q_proj": ("query", "hidden"),
    "self_attn.k_proj": ("key", "hidden"),
    "self_attn.v_proj": ("key", "hidden"),
    "self_attn.o_proj": ("hidden", "query"),
    "mlp.gate_proj": ("branch", "hidden"),
    "mlp.up_proj": ("branch", "hidden"),
    "mlp.down_proj": ("hidden", "branch"),
}
# Modules that servers fuse: one input, and one per-tensor scale.
FUSED = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("mlp.gate_proj", "mlp.up_proj"),
)
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings",
)  # fmt: skip
_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "architectures": (["LlamaForCausalLM"],),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "tie_word_embeddings": (True, False),
}
_FP8_CACHE = {"num_bits": 8, "type": "float", "dynamic": False}


@dataclass(frozen=True)
class Storage:
    """How the weight of a module is stored, and whether its input is quantized.

    Attributes:
        bits: Of a code.
        is_float: FP8 codes.
        group_size: 0: one scale per output channel; -1: one per tensor; otherwise elements.
        is_packed: Codes lie in 32-bit words.
        has_input_scale: Static per-tensor input quantization.
        is_scalar: Scales have no dimension (ModelOpt).
    """

    bits: int
    is_float: bool
    group_size: int
    is_packed: bool
    has_input_scale: bool
    is_scalar: bool = False


@dataclass(frozen=True)
class HfConfig:
    """The parts of `config.json` that decide what the files must look like."""

    raw: dict[str, Any]
    storage: dict[str, Storage]  # by full module name; absent: unquantized

    @property
    def cache_scales(self) -> dict[str, str]:
        """`key`, `value` -> name in a layer of the FP8 cache's scale; empty: it is unquantized."""
        quantization = self.raw.get("quantization_config") or {}
        if quantization.get("kv_cache_scheme") is None:
            return {}
        if self.has_scalar_scales:
            return {"key": "self_attn.k_proj.k_scale", "value": "self_attn.v_proj.v_scale"}
        return {"key": "self_attn.k_scale", "value": "self_attn.v_scale"}

    @property
    def has_scalar_scales(self) -> bool:
        """Per-tensor scales have no dimension (ModelOpt)."""
        return bool(self.raw["quantization_config"]["quant_method"] == "modelopt")

    @property
    def dtype(self) -> str:
        """Safetensors name of the model dtype."""
        return SAFETENSORS_DTYPES[self.raw["torch_dtype"]]

    def size(self, what: str) -> int:
        """`hidden`, `branch` (MLP), `query` or `key` (attention) features."""
        d = int(self.raw["head_dim"])
        return {
            "hidden": int(self.raw["hidden_size"]),
            "branch": int(self.raw["intermediate_size"]),
            "query": int(self.raw["num_attention_heads"]) * d,
            "key": int(self.raw["num_key_value_heads"]) * d,
        }[what]


def all_modules(num_layers: int) -> list[str]:
    """Full names of a decoder's linears."""
    return [f"model.layers.{i}.{module}" for i in range(num_layers) for module in MODULES]


def read_hf_config(directory: Path, problems: list[str]) -> HfConfig | None:
    """Parses and checks `config.json`; complaints go to `problems`, None if it is unusable."""
    try:
        raw = json.loads((directory / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        problems.append(f"config.json: unreadable ({error})")
        return None
    if not isinstance(raw, dict):
        problems.append("config.json: not a JSON object")
        return None
    found = list(_model_problems(raw))
    storage: dict[str, Storage] = {}
    if not found and raw.get("quantization_config") is not None:
        found += _read_quantization(directory, raw, storage)
    problems += [f"config.json: {problem}" for problem in found]
    return None if found else HfConfig(raw, storage)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _model_problems(raw: dict[str, Any]) -> Iterator[str]:
    for key in _SIZES:
        if not _is_size(raw.get(key)):
            yield f"{key}={raw.get(key)!r}, expected a positive integer"
            return
    for key, allowed in _FIXED.items():
        if raw.get(key) not in allowed:
            yield f"{key}={raw.get(key)!r}, expected one of {allowed}"
    if raw.get("torch_dtype") not in SAFETENSORS_DTYPES:
        yield f"torch_dtype={raw.get('torch_dtype')!r}, expected one of {list(SAFETENSORS_DTYPES)}"
    for key in ("rms_norm_eps", "rope_theta"):
        value = raw.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            yield f"{key}={value!r}, expected a positive number"
    scaling = raw.get("rope_scaling")
    if scaling is not None and not _is_llama3(scaling):
        yield f"rope_scaling={scaling!r}, expected null or rope_type llama3 with its four factors"
    if raw["num_attention_heads"] % raw["num_key_value_heads"]:
        yield "num_attention_heads is not a multiple of num_key_value_heads"


def _is_llama3(scaling: Any) -> bool:
    factors = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return (
        isinstance(scaling, dict)
        and scaling.get("rope_type") == "llama3"
        and all(isinstance(scaling.get(key), int | float) for key in factors)
    )


def _read_quantization(
    directory: Path, raw: dict[str, Any], storage: dict[str, Storage]
) -> Iterator[str]:
    """Fills `storage`; yields what is wrong."""
    config = raw["quantization_config"]
    method = config.get("quant_method") if isinstance(config, dict) else None
    modules = all_modules(raw["num_hidden_layers"])
    if method == "modelopt":
        yield from _read_modelopt(directory, config, modules, storage)
    elif method == "compressed-tensors":
        yield from _read_compressed(config, modules, storage)
    else:
        yield f"quantization_config.quant_method={method!r} is not verified here"


def _read_modelopt(
    directory: Path, config: dict[str, Any], modules: list[str], storage: dict[str, Storage]
) -> Iterator[str]:
    try:
        other = json.loads((directory / "hf_quant_config.json").read_text("utf-8"))["quantization"]
        told = (other["quant_algo"], other["exclude_modules"])
        cache = other["kv_cache_quant_algo"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield f"hf_quant_config.json beside it is missing or unusable ({error!r})"
        return
    if (cache, config.get("kv_cache_scheme")) not in ((None, None), ("FP8", _FP8_CACHE)):
        yield (
            f"kv_cache_scheme={config.get('kv_cache_scheme')} with kv_cache_quant_algo={cache!r}, "
            f"expected null with null or {_FP8_CACHE} with 'FP8'"
        )
    if told != (config.get("quant_algo"), config.get("ignore")):
        yield "quantization_config and hf_quant_config.json disagree"
    elif config.get("quant_algo") != "FP8" or "lm_head" not in told[1]:
        yield f"quant_algo={told[0]!r} with exclusions {told[1]} is not verified here"
    else:
        fp8 = Storage(8, True, -1, False, True, is_scalar=True)
        storage |= {name: fp8 for name in modules if name not in told[1]}


def _read_compressed(
    config: dict[str, Any], modules: list[str], storage: dict[str, Storage]
) -> Iterator[str]:
    ignored, groups = config.get("ignore"), config.get("config_groups")
    if not isinstance(ignored, list) or "lm_head" not in ignored or not isinstance(groups, dict):
        yield "quantization_config needs config_groups, and ignore with lm_head"
        return
    cache = config.get("kv_cache_scheme")
    if cache not in (None, {**_FP8_CACHE, "symmetric": True, "strategy": "tensor"}):
        yield f"quantization_config.kv_cache_scheme={cache} is not verified here"
    if config.get("quantization_status") != "compressed":
        yield f"quantization_status={config.get('quantization_status')!r}, expected 'compressed'"
    for name, group in groups.items():
        found, problem = _storage_of(group, group.get("format") or config.get("format"))
        if found is None:
            yield f"config_groups.{name}: {problem}"
            return
        targets = group.get("targets")
        chosen = modules if targets == ["Linear"] else targets
        for module in chosen or []:
            if module not in modules:
                yield f"config_groups.{name}: {module} is not a linear of this model"
            elif module in storage:
                yield f"config_groups.{name}: {module} is in another group too"
            elif module not in ignored:
                storage[module] = found


def _storage_of(group: dict[str, Any], form: str | None) -> tuple[Storage | None, str]:
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    strategy, bits = weights.get("strategy"), weights.get("num_bits")
    is_float = weights.get("type") == "float"
    if weights.get("symmetric") is not True or weights.get("dynamic"):
        return None, "weights must be symmetric and static"
    if strategy not in ("tensor", "channel", "group"):
        return None, f"strategy {strategy!r} is not verified here"
    if form not in ("int-quantized", "float-quantized", "pack-quantized"):
        return None, f"format {form!r} is not verified here"
    if (form == "float-quantized") != is_float or bits not in (4, 8) or (is_float and bits != 8):
        return None, f"format {form!r} with {bits} bits of type {weights.get('type')!r}"
    is_static = {"num_bits": 8, "symmetric": True, "strategy": "tensor", "dynamic": False}
    if inputs is not None and (
        any(inputs.get(key) != value for key, value in is_static.items())
        or inputs.get("type") != weights.get("type")
    ):
        return None, f"input_activations {inputs} are not verified here"
    size = weights.get("group_size")
    if strategy == "group" and not _is_size(size):
        return None, f"group_size={size!r}"
    group_size = {"tensor": -1, "channel": 0}.get(str(strategy), size)
    return Storage(
        bits, is_float, int(group_size or 0), form == "pack-quantized", inputs is not None
    ), ""

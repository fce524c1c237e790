"""What `config.json` of a Hugging Face directory says about its tensors, checked key by key.

Written from the formats' descriptions, not from the exporter: a second opinion.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
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
    "model_type": ("llama", "mistral", "qwen2"),
    "hidden_act": ("silu",),
    "tie_word_embeddings": (True, False),
}
_OF_FAMILY: dict[str, dict[str, tuple[Any, ...]]] = {
    "llama": {
        "architectures": (["LlamaForCausalLM"],),
        "attention_bias": (False, True),
        "mlp_bias": (False, True),
    },
    # Without the key, transformers would take a window of 4096 tokens.
    "mistral": {"architectures": (["MistralForCausalLM"],), "sliding_window": (None,)},
    "qwen2": {"architectures": (["Qwen2ForCausalLM"],), "use_sliding_window": (False,)},
}
_ATTENTION, _MLP = tuple(MODULES)[:4], tuple(MODULES)[4:]
_FP8_CACHE = {"num_bits": 8, "type": "float", "dynamic": False}


@dataclass(frozen=True)
class Storage:
    """How the weight of a module is stored, and how its input is quantized.

    Attributes:
        bits: Of a code.
        is_float: FP8 or FP4 codes.
        group_size: 0: one scale per output channel; -1: one per tensor; otherwise elements.
        packing: `words`: codes in 32-bit words along columns; `rows`: row pairs in bytes; `columns`:
            column pairs in bytes; empty: one element per code.
        input: A kind of `operands.served_input`; None: unquantized.
        is_modelopt: Names and shapes are ModelOpt's: scales of whole tensors have no dimension.
        is_asymmetric: Weights have zero points.
    """

    bits: int
    is_float: bool
    group_size: int
    packing: str = ""
    input: str | None = None
    is_modelopt: bool = False
    is_asymmetric: bool = False

    @property
    def has_two_levels(self) -> bool:
        """FP4: E4M3 block scales under a global one, of weight and input."""
        return self.is_float and self.bits == 4

    @property
    def weight_name(self) -> str:
        """Suffix of the codes."""
        is_packed = self.packing and not self.is_modelopt
        return "weight_packed" if is_packed else "weight"

    @property
    def input_scale_name(self) -> str | None:
        """Suffix of what is frozen of the input."""
        if self.has_two_levels and not self.is_modelopt:
            return "input_global_scale"
        is_frozen = self.input is not None and not self.input.startswith("token")
        return "input_scale" if is_frozen else None


_FP8 = Storage(8, True, -1, input="static fp8", is_modelopt=True)
# `quant_algo` -> storage, up to the group size.
_MODELOPT = {
    "FP8": _FP8,
    "FP8_PER_CHANNEL_PER_TOKEN": replace(_FP8, group_size=0, input="token fp8"),
    "NVFP4": Storage(4, True, 16, "columns", "block fp4", is_modelopt=True),
    "W4A16_AWQ": Storage(4, False, 128, "rows", is_modelopt=True),
    "W4A8_AWQ": Storage(4, False, 128, "rows", "static fp8", is_modelopt=True),
}


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

    @property
    def biased(self) -> tuple[str, ...]:
        """Modules with a bias."""
        if self.raw["model_type"] == "qwen2":
            return _ATTENTION[:3]
        attention, mlp = self.raw.get("attention_bias"), self.raw.get("mlp_bias")
        return (_ATTENTION if attention else ()) + (_MLP if mlp else ())

    def size(self, what: str) -> int:
        """`hidden`, `branch` (MLP), `query` or `key` (attention) features."""
        d = int(self.raw["head_dim"])
        return {
            "hidden": int(self.raw["hidden_size"]),
            "branch": int(self.raw["intermediate_size"]),
            "query": int(self.raw["num_attention_heads"]) * d,
            "key": int(self.raw["num_key_value_heads"]) * d,
        }[what]

    def shape_of(self, name: str) -> tuple[int, int]:
        """(out, in) of a linear such as `model.layers.3.mlp.up_proj`."""
        rows, cols = MODULES[".".join(name.split(".")[3:])]
        return self.size(rows), self.size(cols)


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
    fixed = _FIXED | _OF_FAMILY.get(str(raw.get("model_type")), {})
    for key, allowed in fixed.items():
        if raw.get(key, "nothing") not in allowed:
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
    elif told[0] not in _MODELOPT or "lm_head" not in told[1]:
        yield f"quant_algo={told[0]!r} with exclusions {told[1]} is not verified here"
    else:
        found, size = _MODELOPT[told[0]], other.get("group_size")
        if found.group_size > 0:
            if not _is_size(size):
                yield f"hf_quant_config.json: group_size={size!r}, expected a positive integer"
                return
            found = replace(found, group_size=size)
        is_awq = found.packing == "rows"
        options = (other.get("pre_quant_scale"), other.get("has_zero_point"))
        if is_awq and options != (True, False):
            yield "hf_quant_config.json: AWQ needs pre_quant_scale true and has_zero_point false"
            return
        storage |= {name: found for name in modules if name not in told[1]}


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


# format -> (type, bits) of weights it can hold, and their packing.
_FORMS: dict[str | None, tuple[set[tuple[Any, Any]], str]] = {
    "int-quantized": ({("int", 4), ("int", 8)}, ""),
    "float-quantized": ({("float", 8)}, ""),
    "pack-quantized": ({("int", 4), ("int", 8)}, "words"),
    "nvfp4-pack-quantized": ({("float", 4)}, "columns"),
}
# (type, bits, symmetric, strategy, dynamic) of inputs.
_INPUTS: dict[tuple[Any, ...], str] = {
    ("int", 8, True, "tensor", False): "static int8",
    ("float", 8, True, "tensor", False): "static fp8",
    ("int", 8, True, "token", True): "token int8",
    ("int", 8, False, "token", True): "token uint8",
    ("float", 8, True, "token", True): "token fp8",
    ("float", 4, True, "tensor_group", "local"): "block fp4",
}


def _storage_of(group: dict[str, Any], form: str | None) -> tuple[Storage | None, str]:
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    strategy, kind = weights.get("strategy"), weights.get("type")
    bits: Any = weights.get("num_bits")
    if form not in _FORMS:
        return None, f"format {form!r} is not verified here"
    held, packing = _FORMS[form]
    if (kind, bits) not in held:
        return None, f"format {form!r} with {bits} bits of type {kind!r}"
    is_asymmetric = weights.get("symmetric") is False
    if weights.get("dynamic") or (is_asymmetric and (packing, bits) != ("words", 4)):
        return None, "weights must be static, and symmetric unless they are packed in 4 bits"
    sizes: dict[str, Any] = {
        "tensor": -1,
        "channel": 0,
        "group": weights.get("group_size"),
        "tensor_group": 16,
    }
    if strategy not in sizes or (strategy == "tensor_group") != (packing == "columns"):
        return None, f"strategy {strategy!r} is not verified here"
    if strategy == "group" and not _is_size(sizes["group"]):
        return None, f"group_size={sizes['group']!r}"
    name = None
    if inputs is not None:
        keys = ("type", "num_bits", "symmetric", "strategy", "dynamic")
        name = _INPUTS.get(tuple(inputs.get(key) for key in keys))
        if name is None or inputs.get("type") != kind:
            return None, f"input_activations {inputs} are not verified here"
    size: int = sizes[str(strategy)]
    return Storage(bits, kind == "float", size, packing, name, is_asymmetric=is_asymmetric), ""

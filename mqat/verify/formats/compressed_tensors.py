"""The `quantization_config` of compressed-tensors: groups of linears, each with its operands."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mqat.verify.served_model import ServedModel, is_positive
from mqat.verify.storage import Storage

_FP8_CACHE = {
    "num_bits": 8, "type": "float", "dynamic": False, "symmetric": True, "strategy": "tensor",
}  # fmt: skip
# format -> (type, bits) of weights it can hold, and their packing.
_FORMS: dict[Any, tuple[set[tuple[Any, Any]], str]] = {
    "int-quantized": ({("int", 4), ("int", 8)}, ""),
    "float-quantized": ({("float", 8)}, ""),
    "naive-quantized": ({("int", 8), ("float", 8)}, ""),
    "pack-quantized": ({("int", 4), ("int", 8)}, "words"),
    "nvfp4-pack-quantized": ({("float", 4)}, "columns"),
}
# (type, bits, symmetric, strategy, dynamic) of inputs -> kind.
_INPUTS: dict[tuple[Any, ...], str] = {
    ("int", 8, True, "tensor", False): "static int8",
    ("float", 8, True, "tensor", False): "static fp8",
    ("int", 8, True, "token", True): "token int8",
    ("int", 8, False, "token", True): "token uint8",
    ("float", 8, True, "token", True): "token fp8",
    ("float", 4, True, "tensor_group", "local"): "block fp4",
}


def read(
    directory: Path, config: Mapping[str, Any], model: ServedModel, problems: list[str]
) -> tuple[dict[str, Storage], bool]:
    """How quantized linears are stored, by full name, and whether the cache is FP8.

    Args:
        directory: Holds the configuration.
        config: `quantization_config` of `config.json`.
        model: That the rest of it describes.
        problems: Complaints go here.
    """
    names, head = model.linear_names(), model.names["lm_head"]
    storage: dict[str, Storage] = {}
    ignored, groups = config.get("ignore"), config.get("config_groups")
    if not isinstance(ignored, list) or head not in ignored or not isinstance(groups, dict):
        problems.append(f"quantization_config needs config_groups, and ignore with {head}")
        return storage, False
    cache = config.get("kv_cache_scheme")
    if cache not in (None, _FP8_CACHE):
        problems.append(f"quantization_config.kv_cache_scheme={cache} is not verified here")
    if config.get("quantization_status") != "compressed":
        status = config.get("quantization_status")
        problems.append(f"quantization_status={status!r}, expected 'compressed'")
    for name, group in groups.items():
        try:
            found = _storage_of(group, group.get("format") or config.get("format"), model.dtype)
        except (ValueError, TypeError, AttributeError) as error:
            problems.append(f"config_groups.{name}: {error}")
            continue
        targets = group.get("targets")
        for module in names if targets == ["Linear"] else targets or []:
            if module not in names:
                problems.append(f"config_groups.{name}: {module} is not a linear of this model")
            elif module in storage:
                problems.append(f"config_groups.{name}: {module} is in another group too")
            elif module not in ignored:
                storage[module] = found
    return storage, cache is not None


def _storage_of(group: Mapping[str, Any], form: Any, dtype: str) -> Storage:
    """How a group is stored; a ValueError says what is not verified here."""
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    kind: Any = weights.get("type")
    bits: Any = weights.get("num_bits")
    if form not in _FORMS:
        raise ValueError(f"format {form!r} is not verified here")
    held, packing = _FORMS[form]
    if (kind, bits) not in held:
        raise ValueError(f"format {form!r} with {bits} bits of type {kind!r}")
    is_asymmetric = weights.get("symmetric") is False
    if weights.get("dynamic") or (is_asymmetric and (packing, bits) != ("words", 4)):
        raise ValueError("weights must be static, and symmetric unless they are packed in 4 bits")
    strategy, size = str(weights.get("strategy")), weights.get("group_size")
    known = ("tensor_group",) if packing == "columns" else ("tensor", "channel", "group")
    if strategy not in known:
        raise ValueError(f"strategy {strategy!r} is not verified here")
    if strategy == "group" and not is_positive(size):
        raise ValueError(f"group_size={size!r}")
    granularity = {"group": f"group:{size}", "tensor_group": "group:16"}.get(strategy, strategy)
    keys = ("type", "num_bits", "symmetric", "strategy", "dynamic")
    step = None if inputs is None else _INPUTS.get(tuple(inputs.get(key) for key in keys))
    if inputs is not None and (step is None or inputs["type"] != kind):
        raise ValueError(f"input_activations {inputs} are not verified here")
    names = {"codes": "weight_packed" if packing else "weight", "scale": "weight_scale"}
    names |= {"shape": "weight_shape"} if packing == "words" else {}
    names |= {"zero_point": "weight_zero_point"} if is_asymmetric else {}
    names |= {"global_scale": "weight_global_scale"} if packing == "columns" else {}
    names |= {"input_global_scale": "input_global_scale"} if step == "block fp4" else {}
    names |= {"input_scale": "input_scale"} if (step or "").startswith("static") else {}
    # ExecuTorch's INT4 has float32 steps, others lie on the model dtype's grid: the values tell.
    dtypes = (dtype, "F32")
    return Storage(
        names, bits, kind == "float", granularity, step, packing, scale_dtypes=dtypes,
        is_column=True, is_reciprocal=True,
    )  # fmt: skip

"""TensorRT-LLM checkpoint directories: `config.json` and `quant_cfg.json`, checked key by key."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mqat.verify.export import CacheStorage, Export, Rank
from mqat.verify.facts import find_facts
from mqat.verify.positions import WINDOW_PATTERN
from mqat.verify.served_model import (
    SIZES,
    ServedModel,
    is_positive,
    model_problems,
    own_keys,
    read_json,
)
from mqat.verify.storage import UNQUANTIZED, Module, Storage, without_slice

_KEYS = SIZES | {
    "family": "architecture", "head_dim": "head_size", "rms_norm_eps": "norm_epsilon",
    "rope_theta": "rotary_base", "rope_scaling": "rotary_scaling", "rope_type": "type", "dtype": "dtype",
}  # fmt: skip
_CODES = {"codes": "weight", "scale": "weights_scaling_factor"}
_BY_ROW = {"scale": "per_channel_scale"}
_SMOOTHING = {"smoothing": "prequant_scaling_factor"}
_STATIC = {"input_scale": "activation_scaling_factor"}
_AWQ = Storage(_CODES | _SMOOTHING, 4, granularity="group:128", packing="rows", bytes_dtype="I8")
_W4A8_NAMES = _AWQ.names | _STATIC | {"range_scale": "weights_scaling_factor_2"}
_NVFP4_NAMES = _CODES | {
    "global_scale": "weights_scaling_factor_2", "input_global_scale": "activation_scaling_factor",
}  # fmt: skip
# `quant_algo` of a linear -> storage, up to the group size.
_LINEAR = {
    "FP8": Storage(_CODES | _STATIC, 8, is_float=True, granularity="tensor", input="static fp8"),
    "FP8_PER_CHANNEL_PER_TOKEN": Storage(_CODES | _BY_ROW, 8, is_float=True, input="token fp8"),
    "W8A8_SQ_PER_CHANNEL": Storage(_CODES | _STATIC | _SMOOTHING, 8, input="static int8"),
    "W4A16_AWQ": _AWQ,
    "W4A8_AWQ": replace(_AWQ, names=_W4A8_NAMES, input="static fp8"),
    "NVFP4": Storage(_NVFP4_NAMES, 4, True, "group:16", "block fp4", packing="columns"),
}
# Of a whole model only, besides those of linears.
_WHOLE_MODEL = {None: UNQUANTIZED, "W8A16": replace(UNQUANTIZED, bits=8, is_reloaded=True)}
_ALGORITHMS = (*_WHOLE_MODEL, *_LINEAR, "MIXED_PRECISION")
_GROUP_SIZES = {"W4A16_AWQ": (64, 128), "W4A8_AWQ": (128,)}
_OF_EXPERTS = (
    "FP8",
    "W4A16_AWQ",
)  # what its kernels and its loader know for mixtures, of the above
_OTHER = {"producer", "rotary_scaling", "use_parallel_embedding", "mapping", "quantization"}
_MAPPING = ("world_size", "tp_size", "pp_size")
_QUANTIZATION = {
    "quant_algo", "kv_cache_quant_algo", "group_size", "smoothquant_val", "clamp_val",
    "has_zero_point", "pre_quant_scale", "exclude_modules",
}  # fmt: skip
# What the loader excludes when the file has no list.
_BUILT_IN_EXCLUSIONS = (
    "*lm_head", "*router", "*vocab_embedding", "*position_embedding", "*block_embedding",
    "*shared_expert_gate",
)  # fmt: skip
_MIXED = "quant_cfg.json"


def read_config(directory: Path, problems: list[str]) -> Export | None:
    """The export without its files; complaints go to `problems`, None if it is unusable."""
    raw = read_json(directory / "config.json", problems)
    facts = find_facts("trtllm", "architecture", raw.get("architecture"), problems) if raw else None
    if facts is None:
        return None
    keys = own_keys(_KEYS, facts, "trtllm")
    of_experts = facts.experts_in("trtllm").get("config", {})
    raw = _with_moe_keys(raw) if of_experts else raw
    known = {*keys.values(), *facts.config["trtllm"], *of_experts.values(), *_OTHER}
    known -= {keys["rope_type"]}
    positions = facts.positions.get("trtllm", {})
    known |= {*map(str, positions.values())}
    known |= {*WINDOW_PATTERN} if positions.get("window") == "pattern" else set()
    found = [f"unknown key {key!r}" for key in sorted(set(raw) - known)]
    found += [*model_problems(raw, keys, facts, "trtllm"), *_mapping_problems(raw)]
    found += _quantization_problems(raw.get("quantization"), facts.names["trtllm"])
    if not found:
        tp, pp = raw["mapping"]["tp_size"], raw["mapping"]["pp_size"]
        model = ServedModel(facts, "trtllm", keys, raw, tp, pp)
        found += [*_layout_problems(model), *_expert_problems(model)]
    problems += [f"config.json: {problem}" for problem in found]
    entries = {} if problems else _entries(directory, model, problems)
    if problems:
        return None
    storage = {name: _storage(entry, model.dtype) for name, entry in entries.items()}
    cache = raw["quantization"].get("kv_cache_quant_algo")
    served = CacheStorage(cache == "FP8", facts.cache["trtllm"]) if cache else None
    export = Export(model, storage, served, is_staged=True)
    for layer in range(model.layers_per_stage):
        for module in export.modules(layer):
            problems += _size_problems(module, model.tp)
    return None if problems else export


def find_ranks(directory: Path, export: Export, problems: list[str]) -> list[list[Rank]]:
    """The rank files of each stage, if none is missing; problems with those that are, or too many."""
    model = export.model
    wanted = [f"rank{rank}.safetensors" for rank in range(model.tp * model.pp)]
    found = {file.name for file in directory.glob("*.safetensors")}
    problems += [f"{name}: missing" for name in wanted if name not in found]
    problems += [f"{name}: stale file of another layout" for name in sorted(found - set(wanted))]
    is_mixed = model.raw["quantization"]["quant_algo"] == "MIXED_PRECISION"
    if (directory / _MIXED).exists() and not is_mixed:
        problems.append(f"{_MIXED}: stale, quant_algo is not MIXED_PRECISION")
    if not found.issuperset(wanted):
        return []
    ranks = [Rank(name, [name]) for name in wanted]
    return [ranks[stage * model.tp :][: model.tp] for stage in range(model.pp)]


def _with_moe_keys(raw: Mapping[str, Any]) -> dict[str, Any]:
    """With the keys of the object `moe` beside the others, as `moe.top_k`."""
    moe = raw.get("moe")
    found = {key: value for key, value in raw.items() if key != "moe"}
    return found | {f"moe.{key}": value for key, value in (moe or {}).items()}


def _expert_problems(model: ServedModel) -> Iterator[str]:
    """What a module of all experts of a layer would be made as, against the configuration."""
    names, quantization = model.linear_names(), model.raw["quantization"]
    experts = {without_slice(name) for name in names if "[" in name}
    if not experts:
        return
    if model.value("experts_per_token") > model.value("num_experts"):
        yield "a token has more experts than there are"
    if quantization["quant_algo"] is None:
        return
    if quantization["quant_algo"] not in _OF_EXPERTS:
        yield f"quant_algo={quantization['quant_algo']}: experts are read as {_OF_EXPERTS} only"
        return
    for name in sorted(experts | set(model.routers())):
        is_left = any(fnmatchcase(name, pattern) for pattern in _exclusions(quantization))
        if is_left and name in experts:
            yield f"exclude_modules has {name}, but experts are made for the whole model's algorithm"
        elif not is_left and name not in experts:
            yield f"exclude_modules lets the router {name} be quantized"


def _exclusions(quantization: Mapping[str, Any]) -> Sequence[str]:
    """Patterns of modules that the loader leaves unquantized."""
    told: Sequence[str] | None = quantization.get("exclude_modules")
    return _BUILT_IN_EXCLUSIONS if told is None else told


def _storage(entry: Mapping[str, Any], dtype: str) -> Storage:
    """How a linear is stored, by its entry of the configuration."""
    algorithm = entry.get("quant_algo")
    found = replace((_LINEAR | _WHOLE_MODEL)[algorithm], label=algorithm or "")
    if algorithm not in _GROUP_SIZES:
        return found
    return replace(found, granularity=f"group:{entry['group_size']}", scale_dtypes=(dtype,))


def _entries(directory: Path, model: ServedModel, problems: list[str]) -> dict[str, Any]:
    """What the configuration says about every linear of a stage; complaints go to `problems`."""
    quantization, names = model.raw["quantization"], model.linear_names()
    if quantization["quant_algo"] != "MIXED_PRECISION":
        patterns = _exclusions(quantization)
        excluded = {n for n in names if any(fnmatchcase(without_slice(n), p) for p in patterns)}
        return {name: {} if name in excluded else quantization for name in names}
    found = read_json(directory / _MIXED, problems)
    layers, cache = found.get("quantized_layers"), quantization.get("kv_cache_quant_algo")
    if not isinstance(layers, dict) or found.get("quant_algo") != "MIXED_PRECISION":
        problems.append(f"{_MIXED}: expected quant_algo MIXED_PRECISION and quantized_layers")
        return {}
    if found.get("kv_cache_quant_algo") != cache:
        problems.append(f"{_MIXED}: kv_cache_quant_algo is not config.json's ({cache!r})")
    for name, entry in layers.items():
        if name not in names:
            problems.append(f"{_MIXED}: {name} is not a linear of this model")
        elif not isinstance(entry, dict) or entry.get("quant_algo") not in _LINEAR:
            problems.append(f"{_MIXED}: {name} needs a quant_algo of {tuple(_LINEAR)}")
        else:
            problems += [f"{_MIXED}: {name}: {text}" for text in _awq_problems(entry)]
    return {name: layers.get(name, {}) for name in names}


def _awq_problems(entry: Mapping[str, Any]) -> Iterator[str]:
    """Options that the group-wise INT4 kernels need."""
    algorithm = entry["quant_algo"]
    if algorithm not in _GROUP_SIZES:
        return
    options = {"pre_quant_scale": (True,), "has_zero_point": (False,)}
    for key, allowed in {**options, "group_size": _GROUP_SIZES[algorithm]}.items():
        if entry.get(key) not in allowed:
            yield f"quantization.{key}={entry.get(key)!r}, expected one of {allowed}"


def _mapping_problems(raw: Mapping[str, Any]) -> Iterator[str]:
    mapping = raw.get("mapping")
    if not isinstance(mapping, dict):
        yield f"mapping={mapping!r}, expected an object"
        return
    for key in sorted(set(mapping) - set(_MAPPING)):
        yield f"unknown key mapping.{key} (the loader raises TypeError)"
    wrong = [key for key in _MAPPING if not is_positive(mapping.get(key))]
    yield from (f"mapping.{key}={mapping.get(key)!r}, expected a positive integer" for key in wrong)
    if not wrong and mapping["world_size"] != mapping["tp_size"] * mapping["pp_size"]:
        yield f"mapping.world_size={mapping['world_size']} is not tp_size x pp_size"
    parallel = raw.get("use_parallel_embedding")
    if parallel is not True and (parallel is not False or mapping.get("tp_size") != 1):
        yield f"use_parallel_embedding={parallel!r}, expected true (or false at tp_size 1)"


def _quantization_problems(quantization: Any, names: Mapping[str, str]) -> Iterator[str]:
    if not isinstance(quantization, dict) or "quant_algo" not in quantization:
        yield "quantization: expected an object with quant_algo"
        return
    for key in sorted(set(quantization) - _QUANTIZATION):
        yield f"unknown key quantization.{key} (the loader raises TypeError)"
    algorithm = quantization["quant_algo"]
    for key, known in {
        "quant_algo": _ALGORITHMS,
        "kv_cache_quant_algo": (None, "INT8", "FP8"),
    }.items():
        if quantization.get(key) not in known:
            yield f"{key}={quantization.get(key)!r} is not verified here; known are {known}"
    yield from _awq_problems(quantization)
    excluded = quantization.get("exclude_modules")
    if algorithm is None or excluded is None:
        return
    if not isinstance(excluded, list) or not all(isinstance(item, str) for item in excluded):
        yield "exclude_modules: expected a list of strings"
        return
    for name in (names["lm_head"], names["embedding"]):
        if not any(fnmatchcase(name, pattern) for pattern in excluded):
            yield f"exclude_modules lets {name} be quantized"


def _layout_problems(model: ServedModel) -> Iterator[str]:
    """Rules that tie sizes and layout together."""
    heads, groups = model.value("num_attention_heads"), model.value("num_query_groups")
    inner = model.value(f"{'expert_' * bool(model.routers())}intermediate_size")
    layers, t = model.value("num_layers"), model.tp
    if heads % t or inner % t or (groups % t and t % groups) or heads % groups:
        yield f"tp_size={t} does not fit heads {heads}, key/value heads {groups}, MLP {inner}"
    if layers % model.pp:
        yield f"pp_size={model.pp} does not divide num_hidden_layers={layers}"


def _size_problems(module: Module, tp: int) -> Iterator[str]:
    """The loader pads linears that do not fit the group-wise INT4 kernels."""
    multiple, (out, width) = max(64, module.storage.group_size) * tp, module.shape
    out, width = (out, width * tp) if module.is_row_parallel else (out * tp, width)
    if module.storage.packing == "rows" and (out % multiple or width % multiple):
        why = (
            f"weight {out} x {width} has sizes that are no multiple of {multiple}, the loader pads"
        )
        yield f"config.json: {module.name}: {why}"

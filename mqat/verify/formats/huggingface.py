"""Hugging Face directories: files, index, `config.json` and `hf_quant_config.json`, key by key."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mqat.verify.export import CacheStorage, Export, Rank
from mqat.verify.facts import find_facts
from mqat.verify.served_model import (
    SIZES,
    ServedModel,
    is_positive,
    model_problems,
    own_keys,
    read_json,
)
from mqat.verify.storage import UNQUANTIZED, Storage

_INDEX, _WHOLE = "model.safetensors.index.json", "model.safetensors"
_KEYS = SIZES | {
    "family": "model_type", "head_dim": "head_dim", "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta", "rope_scaling": "rope_scaling", "rope_type": "rope_type",
    "dtype": "torch_dtype", "tie_word_embeddings": "tie_word_embeddings",
}  # fmt: skip
_FP8_CACHE = {"num_bits": 8, "type": "float", "dynamic": False}
_CODES, _STATIC = {"codes": "weight", "scale": "weight_scale"}, {"input_scale": "input_scale"}
_NVFP4_NAMES = _CODES | {"global_scale": "weight_scale_2", "input_global_scale": "input_scale"}
_AWQ_NAMES = _CODES | {"smoothing": "pre_quant_scale"}
_AWQ = Storage(_AWQ_NAMES, 4, granularity="group:128", packing="rows", scalar=())
_W4A8_NAMES = _AWQ.names | _STATIC | {"range_scale": "weight_scale_2"}
# ModelOpt's `quant_algo` -> storage, up to the group size.
_MODELOPT = {
    "FP8": Storage(_CODES | _STATIC, 8, True, "tensor", "static fp8", scalar=()),
    "FP8_PER_CHANNEL_PER_TOKEN": Storage(_CODES, 8, True, input="token fp8", scalar=()),
    "NVFP4": Storage(_NVFP4_NAMES, 4, True, "group:16", "block fp4", packing="columns", scalar=()),
    "W4A16_AWQ": _AWQ,
    "W4A8_AWQ": replace(_AWQ, names=_W4A8_NAMES, input="static fp8"),
}
# compressed-tensors: format -> (type, bits) of weights it can hold, and their packing.
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


def read_config(directory: Path, problems: list[str]) -> Export | None:
    """The export without its files; complaints go to `problems`, None if it is unusable."""
    raw = read_json(directory / "config.json", problems)
    facts = find_facts("hf", "model_type", raw.get("model_type"), problems) if raw else None
    if facts is None:
        return None
    keys = own_keys(_KEYS, facts, "hf")
    found = list(model_problems(raw, keys, facts, "hf"))
    if not found:
        model = ServedModel(facts, "hf", keys, raw, 1, 1)
        if model.value("num_attention_heads") % model.value("num_query_groups"):
            found = ["num_attention_heads is not a multiple of num_key_value_heads"]
    of_experts = facts.experts.get("config", {})
    if not found and of_experts:
        count, groups = model.value("num_experts"), model.value("expert_groups") or 1
        if model.value("experts_per_token") > count:
            found = ["a token has more experts than there are"]
        elif count % groups or (model.value("expert_groups_per_token") or 1) > groups:
            found = [f"{groups} groups of {count} experts, of which a token cannot have as many"]
    if not found:
        config: Any = raw.get("quantization_config")
        storage = dict.fromkeys(model.linear_names(), UNQUANTIZED)
        method = str(config.get("quant_method") if isinstance(config, dict) else config)
        if method == "modelopt":
            found = list(_read_modelopt(directory, config, model, storage))
        elif method == "compressed-tensors":
            found = list(_read_compressed_tensors(config, model, storage))
        elif config is not None:
            found = [f"quantization_config.quant_method={method!r} is not verified here"]
        cache = None
        if not found and config and config.get("kv_cache_scheme"):
            cache = CacheStorage(True, facts.cache[method], () if method == "modelopt" else (1,))
    problems += [f"config.json: {problem}" for problem in found]
    return None if found else Export(model, storage, cache)


def find_ranks(directory: Path, export: Export, problems: list[str]) -> list[list[Rank]]:
    """One stage of one rank, if no file is missing; problems with those that are, or too many."""
    found = {file.name for file in directory.glob("*.safetensors")}
    rank = Rank(_WHOLE, [_WHOLE])
    if (directory / _INDEX).exists():
        index = read_json(directory / _INDEX, problems).get("weight_map")
        if not isinstance(index, dict):
            problems.append(f"{_INDEX}: unusable, without weight_map")
            return []
        rank = Rank(_INDEX, sorted(set(index.values())), index)
    problems += [f"{name}: missing" for name in rank.files if name not in found]
    problems += [f"{name}: stale, not part of this model" for name in found - set(rank.files)]
    return [[rank]] if found.issuperset(rank.files) else []


def _read_modelopt(
    directory: Path, config: Mapping[str, Any], model: ServedModel, storage: dict[str, Storage]
) -> Iterator[str]:
    """Fills `storage`; yields what is wrong."""
    name = "hf_quant_config.json"
    other = read_json(directory / name, []).get("quantization")
    if not isinstance(other, dict) or not isinstance(other.get("exclude_modules"), list):
        yield f"{name} beside it is missing or unusable"
        return
    algorithm, excluded = other.get("quant_algo"), other["exclude_modules"]
    cache = (other.get("kv_cache_quant_algo", ""), config.get("kv_cache_scheme"))
    if cache not in ((None, None), ("FP8", _FP8_CACHE)):
        yield f"kv_cache_scheme={cache[1]} with kv_cache_quant_algo={cache[0]!r} does not fit"
    if (algorithm, excluded) != (config.get("quant_algo"), config.get("ignore")):
        yield f"quantization_config and {name} disagree"
    elif algorithm not in _MODELOPT or model.names["lm_head"] not in excluded:
        yield f"quant_algo={algorithm!r} with exclusions {excluded} is not verified here"
    else:
        found, size = _MODELOPT[algorithm], other.get("group_size")
        for router in model.unquantized_names():
            if router not in excluded:
                yield f"{name}: exclude_modules lets {router} be quantized, which chooses experts"
        if found.group_size and not is_positive(size):
            yield f"{name}: group_size={size!r}, expected a positive integer"
        elif found.group_size:
            found = replace(found, granularity=f"group:{size}", scale_dtypes=(model.dtype,))
        options = (other.get("pre_quant_scale"), other.get("has_zero_point"))
        if "smoothing" in found.names and options != (True, False):
            yield f"{name}: AWQ needs pre_quant_scale true and has_zero_point false"
        storage |= {linear: found for linear in storage if linear not in excluded}


def _read_compressed_tensors(
    config: Mapping[str, Any], model: ServedModel, storage: dict[str, Storage]
) -> Iterator[str]:
    """Fills `storage`; yields what is wrong."""
    head, names, seen = model.names["lm_head"], list(storage), set()
    ignored, groups = config.get("ignore"), config.get("config_groups")
    for router in model.unquantized_names():
        if isinstance(ignored, list) and router not in ignored:
            yield f"quantization_config.ignore lets {router} be quantized, which chooses experts"
    if not isinstance(ignored, list) or head not in ignored or not isinstance(groups, dict):
        yield f"quantization_config needs config_groups, and ignore with {head}"
        return
    cache, status = config.get("kv_cache_scheme"), config.get("quantization_status")
    if cache not in (None, {**_FP8_CACHE, "symmetric": True, "strategy": "tensor"}):
        yield f"quantization_config.kv_cache_scheme={cache} is not verified here"
    if status != "compressed":
        yield f"quantization_status={status!r}, expected 'compressed'"
    for name, group in groups.items():
        try:
            found = _group_storage(group, group.get("format") or config.get("format"), model.dtype)
        except (ValueError, TypeError, AttributeError) as error:
            yield f"config_groups.{name}: {error}"
            continue
        targets = group.get("targets")
        for module in names if targets == ["Linear"] else targets or []:
            if module not in storage:
                yield f"config_groups.{name}: {module} is not a linear of this model"
            elif module in seen:
                yield f"config_groups.{name}: {module} is in another group too"
            elif module not in ignored:
                storage[module] = found
                seen.add(module)


def _group_storage(group: Mapping[str, Any], form: Any, dtype: str) -> Storage:
    """How a group of linears is stored; a ValueError says what is not verified here."""
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
    if strategy not in known or (strategy == "group" and not is_positive(size)):
        raise ValueError(f"strategy {strategy!r} with group_size={size!r} is not verified here")
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
    names |= _STATIC if (step or "").startswith("static") else {}
    # ExecuTorch's INT4 has float32 steps, others lie on the model dtype's grid: the values tell.
    return Storage(
        names, bits, kind == "float", granularity, step, packing, scale_dtypes=(dtype, "F32"),
        is_column=True, is_reciprocal=True,
    )  # fmt: skip

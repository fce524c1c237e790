"""Hugging Face directories: files, index and `config.json`, checked key by key.

Written from the formats' descriptions, not from the exporter: a second opinion.
"""

from __future__ import annotations

import json
from pathlib import Path

from mqat.verify.export import CacheStorage, Export, Rank
from mqat.verify.facts import find_facts
from mqat.verify.formats import compressed_tensors, modelopt
from mqat.verify.served_model import SIZES, ServedModel, model_problems, read_json
from mqat.verify.storage import UNQUANTIZED, Storage

_INDEX, _WHOLE = "model.safetensors.index.json", "model.safetensors"
_KEYS = SIZES | {
    "family": "model_type",
    "head_dim": "head_dim",
    "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "rope_scaling": "rope_scaling",
    "rope_type": "rope_type",
    "dtype": "torch_dtype",
    "tie_word_embeddings": "tie_word_embeddings",
}
# `quant_method` -> reader of its configuration, and shape of a cache's scales.
_STYLES = {"modelopt": (modelopt.read, ()), "compressed-tensors": (compressed_tensors.read, (1,))}


def read_config(directory: Path, problems: list[str]) -> Export | None:
    """The export without its files; complaints go to `problems`, None if it is unusable."""
    raw = read_json(directory / "config.json", problems)
    facts = find_facts("hf", "model_type", raw.get("model_type"), problems) if raw else None
    if facts is None:
        return None
    model = ServedModel(facts, "hf", _KEYS, raw)
    found = list(model_problems(model))
    if not found and model.size("num_attention_heads") % model.size("num_query_groups"):
        found = ["num_attention_heads is not a multiple of num_key_value_heads"]
    config = raw.get("quantization_config")
    storage: dict[str, Storage] = {}
    cache: CacheStorage | None = None
    if not found and config is not None:
        method = config.get("quant_method") if isinstance(config, dict) else config
        if method not in _STYLES:
            found = [f"quantization_config.quant_method={method!r} is not verified here"]
        else:
            read, shape = _STYLES[method]
            storage, has_cache = read(directory, config, model, found)
            cache = CacheStorage(True, facts.cache[method], shape) if has_cache else None
    problems += [f"config.json: {problem}" for problem in found]
    if found:
        return None
    return Export(model, dict.fromkeys(model.linear_names(), UNQUANTIZED) | storage, cache)


def find_ranks(directory: Path, export: Export, problems: list[str]) -> list[list[Rank]]:
    """One stage of one rank: all files; problems with those that are missing or too many."""
    found = {file.name for file in directory.glob("*.safetensors")}
    rank = Rank(_WHOLE, [_WHOLE])
    if (directory / _INDEX).exists():
        try:
            index = dict(json.loads((directory / _INDEX).read_text("utf-8"))["weight_map"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            problems.append(f"{_INDEX}: unusable ({error!r})")
            return []
        rank = Rank(_INDEX, sorted(set(index.values())), index)
    problems += [f"{name}: missing" for name in rank.files if name not in found]
    stale = sorted(found - set(rank.files))
    problems += [f"{name}: stale, not part of this model" for name in stale]
    return [[rank]]

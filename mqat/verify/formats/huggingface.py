"""Hugging Face directories: files, index and `config.json`, checked key by key.

Written from the formats' descriptions, not from the exporter: a second opinion.
"""

from __future__ import annotations

import json
from pathlib import Path

from mqat.verify.export import CacheStorage, Description, Rank
from mqat.verify.facts import find_facts, known_values
from mqat.verify.formats import compressed_tensors, modelopt
from mqat.verify.served_model import Keys, ServedModel, model_problems, read_json
from mqat.verify.storage import Storage

_INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"
KEYS = Keys(
    form="hf",
    family="model_type",
    head_dim="head_dim",
    rms_norm_eps="rms_norm_eps",
    rope_theta="rope_theta",
    rope_scaling="rope_scaling",
    rope_type="rope_type",
    dtype="torch_dtype",
    is_tied="tie_word_embeddings",
)


def read_config(directory: Path, problems: list[str]) -> Description | None:
    """Parses and checks the configuration; complaints go to `problems`, None if it is unusable."""
    raw = read_json(directory, problems)
    if raw is None:
        return None
    facts = find_facts("hf", "model_type", raw.get("model_type"))
    if facts is None:
        known = known_values("hf", "model_type")
        problems.append(
            f"config.json: model_type={raw.get('model_type')!r}, expected one of {known}"
        )
        return None
    found = list(model_problems(raw, KEYS, facts))
    model = ServedModel(facts, KEYS, raw)
    if not found and model.size("num_attention_heads") % model.size("num_query_groups"):
        found = ["num_attention_heads is not a multiple of num_key_value_heads"]
    problems += [f"config.json: {problem}" for problem in found]
    if found:
        return None
    names = [
        model.prefix(layer) + module
        for layer in range(model.layers_per_stage)
        for module in model.modules
    ]
    quantization = raw.get("quantization_config")
    if quantization is None:
        return Description(model, dict.fromkeys(names, Storage({"weight": "weight"})))
    is_object = isinstance(quantization, dict)
    method = str(quantization.get("quant_method")) if is_object else ""
    head = model.names["lm_head"]
    if method == "modelopt":
        storage, has_cache = modelopt.read(directory, quantization, names, head, model.dtype, found)
        scalar: tuple[int, ...] = ()
    elif method == "compressed-tensors":
        storage, has_cache = compressed_tensors.read(quantization, names, head, model.dtype, found)
        scalar = (1,)
    else:
        found.append(f"quantization_config.quant_method={method!r} is not verified here")
    problems += [f"config.json: {problem}" for problem in found]
    if found:
        return None
    stored = {name: storage.get(name, Storage({"weight": "weight"})) for name in names}
    cache = CacheStorage(True, facts.cache[method], scalar) if has_cache else None
    return Description(model, stored, cache)


def find_ranks(directory: Path, description: Description, problems: list[str]) -> list[list[Rank]]:
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
    problems += [
        f"{name}: stale, not part of this model" for name in sorted(found - set(rank.files))
    ]
    return [[rank]]

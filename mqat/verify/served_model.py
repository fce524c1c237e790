"""The model that a `config.json` describes, and the checks of its keys that all formats share."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mqat.verify.facts import Facts
from mqat.verify.positions import position_problems, read_positions

# Of unquantized tensors: name in config.json -> name in safetensors.
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
# Sizes, as checkpoints call them -> key; formats add what they call otherwise.
SIZES = {
    "vocab_size": "vocab_size", "hidden_size": "hidden_size", "num_layers": "num_hidden_layers",
    "intermediate_size": "intermediate_size", "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads", "max_position_embeddings": "max_position_embeddings",
}  # fmt: skip
NUMBERS = ("rms_norm_eps", "rope_theta")


Raw = Mapping[str, Any]
Keys = Mapping[str, str]


class ServedModel:
    """The model that a `config.json` describes, whose keys must have been checked.

    Attributes:
        keys: What the format (`form`: `hf` or `trtllm`) calls `SIZES`, `NUMBERS`, and a few others.
        positions: What attention does with them.
        copies: Consecutive tensor-parallel ranks that hold the same key/value head.
        on_rank: Features of one rank by axis; key/value heads are copied, vocabularies padded.
    """

    def __init__(self, facts: Facts, form: str, keys: Keys, raw: Raw, tp: int, pp: int) -> None:
        self.form, self.raw = form, raw
        of_experts = facts.experts_in(form).get("config", {})
        self.keys = {**keys, **of_experts}
        count = self.value("num_experts")
        told = facts.experts.get("dense", {}) if form == "hf" else {}
        self.dense_layers = _dense_layers(raw, told)
        facts = replace(facts, norms=_norms(raw, facts))
        self._dense_facts = facts
        self.facts = facts.with_experts(count) if of_experts else facts
        self.tp, self.pp = tp, pp  # inference ranks and stages; 1 where files are whole
        heads, groups = self.value("num_attention_heads"), self.value("num_query_groups")
        told = facts.positions.get(form, {})
        self.positions = read_positions(self.value, raw, told, keys["rope_type"])
        self.dtype, self.names = DTYPES[self.value("dtype")], facts.names[form]
        self.is_tied = bool(self.value("tie_word_embeddings"))
        self.layers_per_stage = self.value("num_layers") // pp
        self.copies = max(tp // groups, 1)
        dtype, scale = getattr(torch, self.value("dtype")), math.sqrt(self.value("hidden_size"))
        # As the model was trained: rounded to the dtype of the embedding.
        self.embedding_scale = (
            float(torch.tensor(scale, dtype=dtype)) if facts.scales_embedding else 1
        )
        self.on_rank: dict[str, int] = {
            "hidden": self.value("hidden_size"),
            "head": (d := self.value("head_dim")),
            "intermediate": self.value("intermediate_size") // tp,
            "query": heads // tp * d,
            "key_value": max(groups // tp, 1) * d,
            "vocab": -(-self.value("vocab_size") // tp),
            "positions": -(-self.value("max_position_embeddings") // tp),
        }
        if of_experts:
            self.on_rank["expert"] = self.value("expert_intermediate_size") // tp
            self.on_rank["experts"], self.on_rank["one"] = count, 1
        if shared := facts.experts.get("shared"):
            copies = raw[shared["count"]] if "count" in shared else 1
            self.on_rank["shared"] = copies * raw[shared["size"]] // tp

    def facts_of(self, layer: int) -> Facts:
        """Of one layer, which may have a dense MLP in the place of experts."""
        return self._dense_facts if layer in self.dense_layers else self.facts

    def has_experts(self, layer: int) -> bool:
        """Whether it does not."""
        return bool(self.facts.experts) and layer not in self.dense_layers

    @property
    def expert_weight_scale(self) -> float:
        """What the weights of a token's experts are multiplied by."""
        key = self.facts.experts.get("scale")
        return 1.0 if key is None else float(self.raw[key])

    @property
    def normalizes(self) -> bool:
        """Whether the weights of a token's experts add up to one."""
        told = self.facts.experts_in(self.form)["normalizes"]
        return told if isinstance(told, bool) else bool(self.raw[told])

    def value(self, name: str) -> Any:
        """Of `config.json`, by a name of `keys`; None where the format has no such key."""
        if self.keys.get(name) is not None:
            return self.raw.get(self.keys[name])
        heads = self.raw.get(self.keys["num_attention_heads"])
        hidden = self.raw.get(self.keys["hidden_size"])
        # What a format without these keys means.
        return {"num_query_groups": heads, "head_dim": hidden and heads and hidden // heads}.get(
            name
        )

    def rows(self, role: str) -> int:
        """Of a table, without padding."""
        size = self.value("max_position_embeddings" if role == "positions" else "vocab_size")
        return int(size)

    def prefix(self, layer: int) -> str:
        """Of a layer's names; layers count from 0 in every stage."""
        return self.names["layer"].format(layer)

    def routers(self) -> list[str]:
        """Full names of what chooses experts, in the layers that have some."""
        layers = filter(self.has_experts, range(self.layers_per_stage))
        return [self.prefix(i) + self.facts.experts["router"][self.form] for i in layers]

    def unquantized_names(self) -> list[str]:
        """Routers, and gates of shared experts: what readers take for linears, and must not round."""
        selectors = self.facts.selectors().values()
        return [
            self.prefix(layer) + selector[self.form].removesuffix(".weight")
            for layer in filter(self.has_experts, range(self.layers_per_stage))
            for selector in selectors
            if len(selector["shape"]) == 2
        ]

    def linear_names(self) -> list[str]:
        """Full names of a stage's linears."""
        return [
            self.prefix(layer) + name
            for layer in range(self.layers_per_stage)
            for name in self.facts_of(layer).modules[self.form]
        ]


def _dense_layers(raw: Raw, told: Mapping[str, str]) -> frozenset[int]:
    """Layers without experts."""
    if "first" in told:
        return frozenset(range(raw[told["first"]]))
    return frozenset(raw[told["listed"]]) if told else frozenset()


def _norms(raw: Raw, facts: Facts) -> dict[str, Mapping[str, str]]:
    """Without those that a key leaves out."""
    return {
        role: norm for role, norm in facts.norms.items() if raw.get(norm.get("switch", ""), True)
    }


def _problems_of_experts(raw: Raw, facts: Facts) -> Iterator[str]:
    """Of the keys that only mixtures have, but for `config`, of Hugging Face."""
    told, shared = facts.experts.get("dense", {}), facts.experts.get("shared", {})
    count = raw.get("num_hidden_layers")
    layers = range(count if isinstance(count, int) else 0)

    def is_layer(value: Any) -> bool:
        return type(value) is int and value in layers

    if "first" in told and not is_layer(found := raw.get(told["first"])):
        yield f"{told['first']}={found!r}, expected fewer layers than all"
    if "listed" in told:
        listed = raw.get(told["listed"])
        if not isinstance(listed, list) or not all(map(is_layer, listed)):
            yield f"{told['listed']}={listed!r}, expected a list of layers"
    for key in (shared[name] for name in ("count", "size") if name in shared):
        if not is_positive(raw.get(key)):
            yield f"{key}={raw.get(key)!r}, expected a positive integer"
    scale = facts.experts.get("scale")
    if scale is not None and not is_positive(raw.get(scale), int | float):
        yield f"{scale}={raw.get(scale)!r}, expected a positive number"


def own_keys(keys: Keys, facts: Facts, form: str) -> dict[str, str]:
    """`keys` of a format in the family's words; those that it has none for are left out."""
    own = facts.keys.get(form, {})
    return {name: own.get(name, key) for name, key in keys.items() if own.get(name, key)}


def read_json(file: Path, problems: list[str]) -> dict[str, Any]:
    """An object; empty, with a problem, if it is none."""
    try:
        raw = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        problems.append(f"{file.name}: unreadable ({error})")
        return {}
    if isinstance(raw, dict) and raw:
        return raw
    problems.append(f"{file.name}: not a JSON object with entries")
    return {}


def is_positive(value: Any, kind: Any = int) -> bool:
    """Whether JSON gave a positive number of a kind."""
    return isinstance(value, kind) and not isinstance(value, bool) and bool(value > 0)


def model_problems(raw: Raw, keys: Keys, facts: Facts, form: str) -> Iterator[str]:
    """What is wrong with the keys that describe the model, in a format."""
    fixed, of_experts = facts.config[form], facts.experts_in(form).get("config", {})
    named = [keys[name] for name in (*SIZES, "head_dim") if name in keys]
    for key in (*named, *of_experts.values()):
        if not is_positive(raw.get(key)):
            yield f"{key}={raw.get(key)!r}, expected a positive integer"
    for key in (keys[name] for name in NUMBERS if name in keys):
        if not is_positive(raw.get(key), int | float):
            yield f"{key}={raw.get(key)!r}, expected a positive number"
    for key, allowed in {**fixed, keys["dtype"]: list(DTYPES)}.items():
        value = raw.get(key)
        is_allowed = key in raw and value in allowed
        if not is_allowed or isinstance(value, bool) != isinstance(allowed[0], bool):
            yield f"{key}={value!r}, expected one of {allowed}"
    if form == "hf":
        yield from _problems_of_experts(raw, facts)
    scaling, kind = raw.get(keys.get("rope_scaling", "")), keys["rope_type"]
    yield from position_problems(raw, scaling, facts.positions.get(form, {}), kind, form)

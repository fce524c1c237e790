"""The model that a `config.json` describes, and the checks of its keys that all formats share."""

import json
import math
from collections.abc import Iterator, Mapping
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
            self.on_rank["experts"] = count

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
        """Full names of what chooses experts, in all layers; empty for dense models."""
        router = self.facts.experts.get("router")
        layers = range(self.layers_per_stage if router else 0)
        return [self.prefix(i) + self.facts.experts["router"][self.form] for i in layers]

    def linear_names(self) -> list[str]:
        """Full names of a stage's linears."""
        modules = self.facts.modules[self.form]
        return [self.prefix(i) + name for i in range(self.layers_per_stage) for name in modules]


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
    scaling, kind = raw.get(keys.get("rope_scaling", "")), keys["rope_type"]
    yield from position_problems(raw, scaling, facts.positions.get(form, {}), kind, form)

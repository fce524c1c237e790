"""The model that a `config.json` describes, and the checks of its keys that all formats share."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mqat.verify.facts import Facts

ROPE_FACTORS = (
    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
)  # fmt: skip
# Of unquantized tensors: name in config.json -> name in safetensors.
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
# Sizes, as checkpoints call them -> key; formats add what they call otherwise.
SIZES = {
    "vocab_size": "vocab_size", "hidden_size": "hidden_size", "num_layers": "num_hidden_layers",
    "intermediate_size": "intermediate_size", "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads", "max_position_embeddings": "max_position_embeddings",
}  # fmt: skip
NUMBERS = ("rms_norm_eps", "rope_theta")


@dataclass(frozen=True)
class ServedModel:
    """The model that a `config.json` describes."""

    facts: Facts
    form: str  # `hf` or `trtllm`, as in the facts
    keys: Mapping[str, str]  # what the format calls `SIZES`, `NUMBERS`, and a few others
    raw: Mapping[str, Any]
    tp: int = 1  # tensor-parallel ranks; 1 where files are whole
    pp: int = 1  # pipeline stages

    def value(self, name: str) -> Any:
        """Of `config.json`, by a name of `keys`."""
        return self.raw.get(self.keys[name])

    def size(self, name: str) -> int:
        """An integer of `config.json`, by a name of `keys`."""
        return int(self.value(name))

    @property
    def dtype(self) -> str:
        """Safetensors name of the dtype of unquantized tensors."""
        return DTYPES[self.value("dtype")]

    @property
    def rope_scaling(self) -> dict[str, float] | None:
        """Llama 3's factors."""
        scaling = self.value("rope_scaling")
        return None if scaling is None else {key: scaling[key] for key in ROPE_FACTORS}

    @property
    def is_tied(self) -> bool:
        """The head is the embedding, and not stored."""
        return "tie_word_embeddings" in self.keys and bool(self.value("tie_word_embeddings"))

    @property
    def layers_per_stage(self) -> int:
        """Layers of each pipeline stage."""
        return self.size("num_layers") // self.pp

    @property
    def copies(self) -> int:
        """Consecutive ranks that hold the same key/value head."""
        return max(self.tp // self.size("num_query_groups"), 1)

    @property
    def names(self) -> Mapping[str, str]:
        """Of what stands outside of layers."""
        return self.facts.names[self.form]

    def prefix(self, layer: int) -> str:
        """Of a layer's names; layers count from 0 in every stage."""
        return self.names["layer"].format(layer)

    def linear_names(self) -> list[str]:
        """Full names of a stage's linears."""
        modules = self.facts.modules[self.form]
        return [self.prefix(i) + name for i in range(self.layers_per_stage) for name in modules]

    def on_rank(self, axis: str) -> int:
        """Features of one rank along an axis."""
        heads, groups = self.size("num_attention_heads"), self.size("num_query_groups")
        sizes = {
            "hidden": self.size("hidden_size"),
            "head": self.size("head_dim"),
            "intermediate": self.size("intermediate_size") // self.tp,
            "query": heads // self.tp * self.size("head_dim"),
            "key_value": max(groups // self.tp, 1) * self.size("head_dim"),  # copied heads
            "vocab": -(-self.size("vocab_size") // self.tp),  # padded rows
        }
        return sizes[axis]


def read_json(file: Path, problems: list[str]) -> dict[str, Any]:
    """An object; empty, with a problem, if it is none."""
    try:
        raw = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        problems.append(f"{file.name}: unreadable ({error})")
        return {}
    if not isinstance(raw, dict) or not raw:
        problems.append(f"{file.name}: not a JSON object with entries")
        return {}
    return raw


def is_positive(value: Any, kind: Any = int) -> bool:
    """Whether JSON gave a positive number of a kind."""
    return isinstance(value, kind) and not isinstance(value, bool) and bool(value > 0)


def model_problems(model: ServedModel) -> Iterator[str]:
    """What is wrong with the keys that describe the model."""
    raw, keys, allowed_values = model.raw, model.keys, model.facts.config[model.form]
    for name in (*SIZES, "head_dim"):
        if not is_positive(model.value(name)):
            yield f"{keys[name]}={model.value(name)!r}, expected a positive integer"
    for name in NUMBERS:
        if not is_positive(model.value(name), int | float):
            yield f"{keys[name]}={model.value(name)!r}, expected a positive number"
    for key, allowed in {**allowed_values, keys["dtype"]: list(DTYPES)}.items():
        value = raw.get(key)
        is_allowed = key in raw and value in allowed
        if not is_allowed or isinstance(value, bool) != isinstance(allowed[0], bool):
            yield f"{key}={value!r}, expected one of {allowed}"
    scaling = model.value("rope_scaling")
    if scaling is None:
        return
    where, kind = keys["rope_scaling"], keys["rope_type"]
    known = isinstance(scaling, dict) and scaling.get(kind) == "llama3"
    if not known or not all(is_positive(scaling.get(key), int | float) for key in ROPE_FACTORS):
        yield f"{where}={scaling!r}, expected null, or {kind} llama3 with positive {ROPE_FACTORS}"
    elif scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        yield f"{where}.high_freq_factor must be above low_freq_factor"

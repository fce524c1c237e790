"""The model that a `config.json` describes, and the checks of its keys that all formats share."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mqat.verify.facts import Facts
from mqat.verify.tensor_specs import DTYPES

ROPE_FACTORS = (
    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
)  # fmt: skip
# What both formats call alike; the others are given by `keys`.
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "max_position_embeddings": "max_position_embeddings",
}


@dataclass(frozen=True)
class Keys:
    """What a format's `config.json` calls things.

    Attributes:
        form: Name of the format in the facts.
        family: Key by which the family is found.
        head_dim: Channels of a head.
        rms_norm_eps: Of all norms.
        rope_theta: Base of the rotary frequencies.
        rope_scaling: Llama 3's factors, or null.
        rope_type: Key in there that says `llama3`.
        dtype: Of unquantized tensors.
        is_tied: The head is the embedding, and not stored.
    """

    form: str
    family: str
    head_dim: str
    rms_norm_eps: str
    rope_theta: str
    rope_scaling: str
    rope_type: str
    dtype: str
    is_tied: str | None = None

    @property
    def sizes(self) -> dict[str, str]:
        """Size, as checkpoints call it -> key."""
        return _SIZES | {"head_dim": self.head_dim}

    @property
    def numbers(self) -> dict[str, str]:
        """Positive number, as checkpoints call it -> key."""
        return {"rms_norm_eps": self.rms_norm_eps, "rope_theta": self.rope_theta}


@dataclass(frozen=True)
class ServedModel:
    """The model that a `config.json` describes.

    Attributes:
        facts: Of its family.
        keys: Of its format.
        raw: The whole `config.json`.
        tp: Tensor-parallel ranks; 1 where files are whole.
        pp: Pipeline stages.
    """

    facts: Facts
    keys: Keys
    raw: Mapping[str, Any]
    tp: int = 1
    pp: int = 1

    def size(self, name: str) -> int:
        """A size or number, as checkpoints call it."""
        return int(self.raw[self.keys.sizes[name]])

    def number(self, name: str) -> float:
        """A positive number, as checkpoints call it."""
        return float(self.raw[self.keys.numbers[name]])

    @property
    def dtype(self) -> str:
        """Safetensors name of the dtype of unquantized tensors."""
        return DTYPES[self.raw[self.keys.dtype]]

    @property
    def rope_scaling(self) -> dict[str, float] | None:
        """Llama 3's factors."""
        scaling = self.raw.get(self.keys.rope_scaling)
        return None if scaling is None else {key: scaling[key] for key in ROPE_FACTORS}

    @property
    def is_tied(self) -> bool:
        """The head is the embedding, and not stored."""
        return self.keys.is_tied is not None and bool(self.raw[self.keys.is_tied])

    @property
    def layers_per_stage(self) -> int:
        """Layers of each pipeline stage."""
        return self.size("num_layers") // self.pp

    @property
    def copies(self) -> int:
        """Consecutive ranks that hold the same key/value head."""
        return max(self.tp // self.size("num_query_groups"), 1)

    @property
    def modules(self) -> Mapping[str, tuple[str, ...]]:
        """Module in a layer -> roles."""
        return self.facts.modules[self.keys.form]

    @property
    def names(self) -> Mapping[str, str]:
        """Of what stands outside of layers."""
        return self.facts.names[self.keys.form]

    def prefix(self, layer: int) -> str:
        """Of a layer's names; layers of a stage count from 0."""
        return self.names["layer"].format(layer)

    def on_rank(self, axis: str) -> int:
        """Features of one rank along an axis."""
        heads, groups = self.size("num_attention_heads"), self.size("num_query_groups")
        head_dim = self.size("head_dim")
        sizes = {
            "hidden": self.size("hidden_size"),
            "head": head_dim,
            "intermediate": self.size("intermediate_size") // self.tp,
            "query": heads // self.tp * head_dim,
            "key_value": max(groups // self.tp, 1) * head_dim,  # copied heads
            "vocab": -(-self.size("vocab_size") // self.tp),  # padded rows
        }
        return sizes[axis]

    def is_row_parallel(self, module: str) -> bool:
        """Whether ranks hold columns of a module."""
        return self.facts.parts[self.modules[module][0]].is_row_parallel

    def rows(self, module: str) -> list[int]:
        """Rows of each part of a module on one rank."""
        return [self.on_rank(self.facts.parts[role].rows) for role in self.modules[module]]

    def shape(self, module: str) -> tuple[int, int]:
        """(out, in) of one rank's part of a module."""
        columns = self.facts.parts[self.modules[module][0]].columns
        return sum(self.rows(module)), self.on_rank(columns)

    def has_bias(self, module: str) -> bool:
        """Whether a module has a bias; that of a row-parallel one is added once, after the sum."""
        key = self.facts.biases.get(self.keys.form, {}).get(self.modules[module][0])
        return key is True or bool(key and self.raw.get(key))


def read_json(directory: Path, problems: list[str]) -> dict[str, Any] | None:
    """`config.json`; None, with a problem, if it is not an object."""
    try:
        raw = json.loads((directory / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        problems.append(f"config.json: unreadable ({error})")
        return None
    if not isinstance(raw, dict):
        problems.append("config.json: not a JSON object")
        return None
    return raw


def is_size(value: Any) -> bool:
    """Whether JSON gave a positive integer."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_positive(value: Any) -> bool:
    """Whether JSON gave a positive number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def model_problems(raw: Mapping[str, Any], keys: Keys, facts: Facts) -> Iterator[str]:
    """What is wrong with the keys that describe the model."""
    for key in keys.sizes.values():
        if not is_size(raw.get(key)):
            yield f"{key}={raw.get(key)!r}, expected a positive integer"
    for key in keys.numbers.values():
        if not is_positive(raw.get(key)):
            yield f"{key}={raw.get(key)!r}, expected a positive number"
    for key, allowed in [*facts.config[keys.form].items(), (keys.dtype, list(DTYPES))]:
        value = raw.get(key)
        is_allowed = key in raw and value in allowed
        if not is_allowed or isinstance(value, bool) != isinstance(allowed[0], bool):
            yield f"{key}={value!r}, expected one of {allowed}"
    scaling = raw.get(keys.rope_scaling)
    if scaling is None:
        return
    known = isinstance(scaling, dict) and scaling.get(keys.rope_type) == "llama3"
    if not known or not all(is_positive(scaling.get(key)) for key in ROPE_FACTORS):
        yield (
            f"{keys.rope_scaling}={scaling!r}, expected null, or {keys.rope_type} llama3 with positive "
            f"{', '.join(ROPE_FACTORS)}"
        )
    elif scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        yield f"{keys.rope_scaling}.high_freq_factor must be above low_freq_factor"

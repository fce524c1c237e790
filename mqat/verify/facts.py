"""What a family of models is made of, and its names in checkpoints and exports: `facts/<family>.yaml`.

A second opinion on purpose: nothing here comes from `mqat.models`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent / "facts"


@dataclass(frozen=True)
class Part:
    """A linear as the model's formula has it: `query`, `gate`, `down`, ...

    Attributes:
        role: Its name in the formula.
        rows: Axis of its output features: `hidden`, `intermediate`, `query`, `key_value`.
        columns: Axis of its input features.
        is_row_parallel: Tensor-parallel ranks hold some of its columns; otherwise some of its rows.
    """

    role: str
    rows: str
    columns: str
    is_row_parallel: bool = False


@dataclass(frozen=True)
class Fused:
    """A linear of the checkpoint.

    Attributes:
        parts: Roles, in row order.
        is_by_query_group: Rows go query group by query group, each group's part by part.
    """

    parts: tuple[str, ...]
    is_by_query_group: bool = False


@dataclass(frozen=True)
class Facts:
    """The parsed file of a family; `format` below is `hf` or `trtllm`.

    Attributes:
        family: Its name in checkpoints.
        config: Format -> key of `config.json` -> allowed values.
        biases: Format -> role -> key of `config.json` that gives it a bias, or true.
        names: `checkpoint` or format -> `layer`, `embedding`, `lm_head`, `final_norm` -> name.
        norms: Role -> `size` (an axis), and name in the checkpoint and in each format.
        fused: Linear of the checkpoint -> its parts.
        parts: Role -> part.
        modules: Format -> module in a layer -> roles, in row order.
        cache: `checkpoint` -> module; style of an export -> `key`, `value` -> name of its scale.
    """

    family: str
    config: Mapping[str, Mapping[str, list[Any]]]
    biases: Mapping[str, Mapping[str, str | bool]]
    names: Mapping[str, Mapping[str, str]]
    norms: Mapping[str, Mapping[str, str]]
    fused: Mapping[str, Fused]
    parts: Mapping[str, Part]
    modules: Mapping[str, Mapping[str, tuple[str, ...]]]
    cache: Mapping[str, Any]

    def key(self, name: str) -> str:
        """Checkpoint key of a tensor that is stacked over layers."""
        return f"{self.names['checkpoint']['layer']}{name}"

    def in_layer(self, layer: int, name: str) -> str:
        """Global name in the checkpoint of a module of one layer."""
        return self.key(f"{layer}.{name}")


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with the changes of a family, at every depth; null removes an entry."""
    merged = dict(base)
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            merged[key] = _merge(base[key], value)
        else:
            merged[key] = value
    return {key: value for key, value in merged.items() if value is not None}


def _raw(family: str) -> dict[str, Any]:
    raw: dict[str, Any] = yaml.safe_load((FOLDER / f"{family}.yaml").read_text("utf-8"))
    return _merge(_raw(raw.pop("based_on")), raw) if "based_on" in raw else raw


def read_facts(family: str) -> Facts:
    """The facts of a family whose file exists."""
    raw = {"biases": {}} | _raw(family)
    modules: dict[str, dict[str, tuple[str, ...]]] = {"hf": {}, "trtllm": {}}
    parts = {}
    for role, entry in raw.pop("linears").items():
        for form, found in modules.items():
            name = entry.pop(form)
            found[name] = (*found.get(name, ()), role)
        parts[role] = Part(role, **entry)
    fused = {
        name: Fused(tuple(entry.pop("parts")), **entry) for name, entry in raw.pop("fused").items()
    }
    return Facts(fused=fused, parts=parts, modules=modules, **raw)


def find_facts(form: str, key: str, value: Any) -> Facts | None:
    """The family whose `config.json` in a format has a value under a key; None: none has."""
    for file in sorted(FOLDER.glob("*.yaml")):
        facts = read_facts(file.stem)
        if value in facts.config[form][key]:
            return facts
    return None


def known_values(form: str, key: str) -> list[Any]:
    """Values of a key of `config.json` over all families."""
    files = sorted(FOLDER.glob("*.yaml"))
    return [value for file in files for value in read_facts(file.stem).config[form][key]]

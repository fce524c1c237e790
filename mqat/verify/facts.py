"""What families of models are made of, and their names elsewhere, from `facts/<family>.yaml`.

A second opinion on purpose: nothing here comes from `mqat.models`. The files explain the fields.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent / "facts"
_MLP = ("gate", "up", "down")  # of a dense one


@dataclass(frozen=True)
class Part:
    """A linear as the model's formula has it."""

    role: str  # `query`, `gate`, `down`, ...
    rows: str  # axis of its output features: `hidden`, `intermediate`, `query`, `key_value`
    columns: str  # axis of its input features
    is_row_parallel: bool = False  # ranks hold some of its columns, otherwise some of its rows


@dataclass(frozen=True)
class Facts:
    """The parsed file of a family."""

    family: str
    config: Mapping[str, Mapping[str, list[Any]]]
    names: Mapping[str, Mapping[str, str]]
    norms: Mapping[str, Mapping[str, str]]
    fused: Mapping[str, Mapping[str, Any]]
    parts: Mapping[str, Part]
    modules: Mapping[str, Mapping[str, tuple[str, ...]]]  # format -> module -> roles in row order
    cache: Mapping[str, Any]
    biases: Mapping[str, Mapping[str, str | bool]]
    positions: Mapping[str, Mapping[str, Any]]  # format -> what of `positions.Positions` is where
    keys: Mapping[str, Mapping[str, str]]  # format -> what it calls a key of Llama's
    norm: str  # of `activations.NORMS`; `layer` has biases
    one_less: tuple[str, ...]  # formats, and `checkpoint`, whose norms are stored less one
    activation: str  # of `activations.ACTIVATIONS`; gated where there is a part `gate`
    scales_embedding: bool  # by sqrt(hidden), rounded to the model's dtype
    transposed: tuple[str, ...]  # formats that hold unquantized weights as (in, out)
    experts: Mapping[str, Any]  # empty: none; names have `{}` for the number of an expert

    def norm_tensors(self) -> tuple[str, ...]:
        """Parameters of a norm."""
        return ("weight", "bias") if self.norm == "layer" else ("weight",)

    def experts_in(self, form: str) -> Mapping[str, Any]:
        """`experts` as a format has them."""
        return {**self.experts, **self.experts.get(form, {})}

    def with_experts(self, count: int) -> "Facts":
        """Of a layer with `count` experts in the place of the MLP.

        Roles end in their numbers (`gate 3`), and those of a shared one in `shared`. A module of
        TensorRT-LLM has a slice for each expert, which is a module here (`mlp.fc[3]`).
        """
        outside = {name: e for name, e in self.fused.items() if not {*e["parts"]} & {*_MLP}}
        fused, parts = dict(outside), {r: p for r, p in self.parts.items() if r not in _MLP}
        modules = {
            form: {name: roles for name, roles in found.items() if not {*roles} & {*_MLP}}
            for form, found in self.modules.items()
        }
        norm = {**self.norms["mlp_norm"], "checkpoint": self.experts["norm"]}
        for name, roles in self.experts_in("trtllm").get("modules", {}).items():
            for number in range(count):
                modules["trtllm"][f"{name}[{number}]"] = tuple(f"{role} {number}" for role in roles)
        owners: list[tuple[Any, Mapping[str, Any]]] = [(n, self.experts) for n in range(count)]
        if "shared" in self.experts:
            owners.append(("shared", self.experts["shared"]))
        for owner, told in owners:
            for role, entry in told["linears"].items():
                own = f"{role} {owner}"
                cut = {key: value for key, value in entry.items() if key != "hf"}
                parts[own] = Part(own, **cut)
                modules["hf"][entry["hf"].format(owner)] = (own,)
            for name, entry in told["fused"].items():
                found = {"parts": [f"{role} {owner}" for role in entry["parts"]]}
                if "stacked" in entry:
                    found |= {"stacked": entry["stacked"], "expert": owner}
                fused[name.format(owner)] = found
        norms = {**self.norms, "mlp_norm": norm}
        return replace(self, fused=fused, parts=parts, modules=modules, norms=norms)

    def selectors(self) -> dict[str, Mapping[str, Any]]:
        """What chooses and weighs experts: role -> its names of tensors and its shape."""
        if not self.experts:
            return {}
        router = self.experts["router"]
        weight: dict[str, Any] = {form: f"{name}.weight" for form, name in router.items()}
        weight |= {"checkpoint": router["checkpoint"], "shape": ["experts", "hidden"]}
        return {"router": weight, **self.experts.get("beside", {})}

    def key(self, name: str) -> str:
        """Checkpoint key of a tensor that is stacked over layers."""
        return f"{self.names['checkpoint']['layer']}{name}"


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the changes of a family, at every depth; null removes an entry."""
    merged = dict(base)
    for key, value in changes.items():
        is_deep = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if is_deep else value
    return {key: value for key, value in merged.items() if value is not None}


def _read_raw(family: str) -> dict[str, Any]:
    raw: dict[str, Any] = yaml.safe_load((FOLDER / f"{family}.yaml").read_text("utf-8"))
    return _merge(_read_raw(raw.pop("based_on")), raw) if "based_on" in raw else raw


@functools.cache
def read_facts(family: str) -> Facts:
    """The facts of a family whose file exists."""
    defaults: dict[str, Any] = {
        "biases": {}, "positions": {}, "keys": {}, "one_less": (), "transposed": (), "experts": {},
    }  # fmt: skip
    raw = defaults | _read_raw(family)
    order = raw.pop("row_order", {})
    modules: dict[str, dict[str, tuple[str, ...]]] = {"hf": {}, "trtllm": {}}
    parts = {}
    for role, entry in raw.pop("linears").items():
        for form, found in modules.items():
            name = entry.pop(form)
            found[name] = (*found.get(name, ()), role)
        parts[role] = Part(role, **entry)
    for form, found in order.items():
        modules[form] |= {name: tuple(roles) for name, roles in found.items()}
    return Facts(parts=parts, modules=modules, **raw)


def find_facts(form: str, key: str, value: Any, problems: list[str]) -> Facts | None:
    """The family whose `config.json` in a format has a value under a key; None, with a problem."""
    families = [read_facts(file.stem) for file in sorted(FOLDER.glob("*.yaml"))]
    for facts in families:
        if value in facts.config[form][key]:
            return facts
    known = [known for facts in families for known in facts.config[form][key]]
    problems.append(f"config.json: {key}={value!r}, expected one of {known}")
    return None

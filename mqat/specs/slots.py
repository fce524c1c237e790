"""Layer specs by the names of a layer's modules: what a slot holds, and copies with other contents."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mqat.runtime.megatron_releases import submodules_of, with_submodules


def spec_slot(spec: Any, name: str) -> Any:
    """What a layer spec says about a module, by its name in the layer; None: nothing."""
    for part in name.split("."):
        spec = getattr(submodules_of(spec), part, None)
    return spec


def with_slots(spec: Any, slots: Mapping[str, Any]) -> Any:
    """A copy of a layer spec with other modules in some places, by their names in the layer."""
    own = {name: module for name, module in slots.items() if "." not in name}
    nested: dict[str, dict[str, Any]] = {}
    for name, module in slots.items():
        first, _, rest = name.partition(".")
        if rest:
            nested.setdefault(first, {})[rest] = module
    inside = {first: with_slots(spec_slot(spec, first), rest) for first, rest in nested.items()}
    return with_submodules(spec, replace(submodules_of(spec), **own, **inside))


def class_name(slot: Any) -> str:
    """Of what a slot builds: a class, a spec of one, or a builder bound to one."""
    builder = getattr(slot, "func", slot)  # functools.partial
    built = getattr(builder, "module", builder)  # ModuleSpec
    owner = getattr(built, "__self__", built)  # MLP.as_mlp_submodule
    return getattr(owner, "__name__", str(owner))

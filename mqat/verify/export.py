"""An exported directory: what it must hold by its configuration, and the tensors themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mqat.verify.served_model import ServedModel
from mqat.verify.storage import Module, Storage, StoredLinear, TensorSpec


@dataclass(frozen=True)
class CacheStorage:
    """A quantized key/value cache."""

    is_float: bool  # FP8 E4M3 codes; otherwise INT8
    names: Mapping[str, str]  # `key`, `value` -> name in a layer of its scale
    shape: tuple[int, ...] = (1,)  # of each scale

    def __str__(self) -> str:
        """As in messages and tables."""
        return "FP8" if self.is_float else "INT8"


@dataclass
class Rank:
    """The tensors of one rank, read one at a time."""

    label: str  # file that problems name where a tensor is missing
    files: Sequence[str]
    index: Mapping[str, str] = field(default_factory=dict)  # tensor -> file, as an index claims
    found: dict[str, str] = field(default_factory=dict)  # tensor -> file; filled by `open`
    _handles: dict[str, safe_open] = field(default_factory=dict)

    def open(self, directory: Path) -> list[str]:
        """Opens the files; problems with files that cannot be."""
        problems = []
        for file in self.files:
            try:
                self._handles[file] = handle = safe_open(directory / file, framework="pt")
                self.found |= dict.fromkeys(handle.keys(), file)
            except (OSError, SafetensorError) as error:
                problems.append(f"{file}: truncated or not safetensors ({error})")
        return problems

    def header(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype."""
        header = self._handles[self.found[name]].get_slice(name)
        return tuple(header.get_shape()), header.get_dtype()

    def tensor(self, name: str) -> Tensor:
        """One tensor."""
        return self._handles[self.found[name]].get_tensor(name)

    def linear(self, module: Module) -> StoredLinear:
        """This rank's part of a module."""
        return StoredLinear(module, {t: self.tensor(module.full(t)) for t in module.suffixes})


@dataclass
class Export:
    """A directory; made by an adapter in `formats/`, which reads its configuration."""

    model: ServedModel
    storage: Mapping[str, Storage]  # full name of a linear -> how it is stored
    cache: CacheStorage | None = None  # None: keys and values are not quantized
    is_staged: bool = False  # layer names restart in every stage, so problems must tell the stage
    stages: Sequence[Sequence[Rank]] = ()  # of each pipeline stage, its tensor-parallel ranks

    def modules(self, layer: int) -> list[Module]:
        """The linears of a layer, counted in its stage."""
        model, facts = self.model, self.model.facts
        found = []
        for name, roles in facts.modules[model.form].items():
            parts, full = tuple(facts.parts[role] for role in roles), model.prefix(layer) + name
            switch = facts.biases.get(model.form, {}).get(roles[0])
            has_bias = switch is True or bool(switch and model.raw.get(switch))
            suffixes = self.storage[full].names | ({"bias": "bias"} if has_bias else {})
            rows = tuple(model.on_rank(part.rows) for part in parts)
            cut = (rows, model.on_rank(parts[0].columns), model.dtype, model.copies)
            found.append(Module(full, parts, self.storage[full], suffixes, *cut))
        return found

    def small_specs(self, layer: int) -> dict[str, TensorSpec]:
        """Name of a layer's norms and cache scales -> what every rank must hold."""
        model, prefix = self.model, self.model.prefix(layer)
        specs = {}
        for norm in model.facts.norms.values():
            shape = (model.on_rank(norm["size"]),)
            specs[f"{prefix}{norm[model.form]}.weight"] = TensorSpec(shape, (model.dtype,), True)
        if self.cache is not None:
            scale = TensorSpec(self.cache.shape, ("F32",), True)
            specs |= {prefix + name: scale for name in self.cache.names.values()}
        return specs

    def outer_specs(self, stage: int) -> dict[str, TensorSpec]:
        """Name of what stands outside of layers -> what every rank of a stage must hold."""
        model, names = self.model, self.model.names
        hidden = model.on_rank("hidden")
        table = TensorSpec((model.on_rank("vocab"), hidden), (model.dtype,))
        specs = {"embedding": table} if stage == 0 else {}
        if stage == model.pp - 1:
            specs["final_norm"] = TensorSpec((hidden,), (model.dtype,), True)
            specs |= {} if model.is_tied else {"lm_head": table}
        return {f"{names[role]}.weight": spec for role, spec in specs.items()}

    def specs(self, stage: int) -> dict[str, TensorSpec]:
        """Name -> what every rank of a pipeline stage must hold."""
        specs = self.outer_specs(stage)
        for layer in range(self.model.layers_per_stage):
            specs |= self.small_specs(layer)
            for module in self.modules(layer):
                specs |= {module.full(tensor): spec for tensor, spec in module.specs().items()}
        return specs

    def table(self, role: str, stage: int) -> Tensor:
        """A vocabulary table [vocab, hidden] without its padding."""
        rows = [rank.tensor(f"{self.model.names[role]}.weight") for rank in self.stages[stage]]
        return torch.cat(rows)[: self.model.size("vocab_size")]

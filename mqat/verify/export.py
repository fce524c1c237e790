"""An exported directory: what it must hold by its configuration, and the tensors themselves."""

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
        return "FP8" if self.is_float else "INT8"


@dataclass
class Rank:
    """The tensors of one rank, read one at a time."""

    label: str  # file that problems name where a tensor is missing
    files: Sequence[str]
    index: Mapping[str, str] = field(default_factory=dict)  # tensor -> file, as an index claims
    found: dict[str, str] = field(default_factory=dict)  # tensor -> file; filled by `open`
    keeps_weights: bool = (
        False  # in memory, once they were read: for text, which takes them for each token
    )
    _handles: dict[str, safe_open] = field(default_factory=dict)
    _kept: dict[str, tuple[StoredLinear, Tensor]] = field(default_factory=dict)

    def open(self, directory: Path) -> list[str]:
        """Opens the files; problems with files that cannot be."""
        problems = []
        for file in self.files:
            try:
                self._handles[file] = handle = safe_open(directory / file, framework="pt")
                names = dict.fromkeys(handle.keys(), file)
                twice = sorted(names.keys() & self.found.keys())
                problems += [f"{name}: is in {self.found[name]} and in {file}" for name in twice]
                self.found |= names
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

    def _of_module(self, module: Module, tensor: str) -> Tensor:
        """One of its tensors, or its slice of it."""
        name = module.full(tensor)
        if not module.is_stacked(tensor):
            return self.tensor(name)
        found: Tensor = self._handles[self.found[name]].get_slice(name)[module.expert]
        return found

    def linear(self, module: Module) -> StoredLinear:
        """This rank's part of a module."""
        tensors = {t: self._of_module(module, t) for t in module.suffixes}
        if module.is_transposed and "weight" in tensors:
            tensors["weight"] = tensors["weight"].t()
        return StoredLinear(module, tensors)

    def served(self, module: Module) -> tuple[StoredLinear, Tensor]:
        """The same, and what a server multiplies by, float32 [O, I]."""
        if module.name in self._kept:
            return self._kept[module.name]
        linear = self.linear(module)
        found = linear, linear.weight()
        if self.keeps_weights:
            self._kept[module.name] = found
        return found


@dataclass(frozen=True)
class PlainTensor:
    """A tensor outside of linears."""

    name: str
    spec: TensorSpec
    role: str  # of `facts.names`, `facts.norms` or `facts.selectors()`; `key`, `value` of a cache
    layer: int | None = None  # global number
    kind: str = "weight"  # or `bias`


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
        model, facts = self.model, self.model.facts_of(layer)
        found = []
        for name, roles in facts.modules[model.form].items():
            parts, full = tuple(facts.parts[role] for role in roles), model.prefix(layer) + name
            switch = facts.biases.get(model.form, {}).get(roles[0])
            has_bias = switch is True or bool(switch and model.raw.get(switch))
            suffixes = self.storage[full].names | ({"bias": "bias"} if has_bias else {})
            rows = tuple(model.on_rank[part.rows] for part in parts)
            shape = (sum(rows), model.on_rank[parts[0].columns])
            cut = (rows, shape, parts[0].is_row_parallel, model.copies)
            is_transposed = model.form in facts.transposed
            stack = (model.on_rank["experts"], _slice(name)) if "[" in name else ()
            kind = (suffixes, model.dtype, *cut, is_transposed, *stack)
            found.append(Module(full, parts, self.storage[full], *kind))
        return found

    def plain(self, stage: int) -> list[PlainTensor]:
        """What stands outside of linears in a pipeline stage."""
        model, names, dtypes = self.model, self.model.names, (self.model.dtype,)
        facts = model.facts
        found = [
            PlainTensor(f"{names[role]}.weight", self._table_spec(axis), role)
            for role, axis in (("embedding", "vocab"), ("positions", "positions"))
            if stage == 0 and role in names
        ]
        if stage == model.pp - 1:
            hidden = TensorSpec((model.on_rank["hidden"],), dtypes, True)
            found += [
                PlainTensor(f"{names['final_norm']}.{kind}", hidden, "final_norm", kind=kind)
                for kind in facts.norm_tensors()
            ]
            if not model.is_tied:
                found.append(
                    PlainTensor(f"{names['lm_head']}.weight", self._table_spec("vocab"), "lm_head")
                )
        scale = TensorSpec(() if self.cache is None else self.cache.shape, ("F32",), True)
        for layer in range(model.layers_per_stage):
            prefix, place = model.prefix(layer), stage * model.layers_per_stage + layer
            for role, norm in facts.norms.items():
                spec = TensorSpec((model.on_rank[norm["size"]],), dtypes, True)
                for kind in facts.norm_tensors():
                    name = f"{prefix}{norm[model.form]}.{kind}"
                    found.append(PlainTensor(name, spec, role, place, kind))
            for role, told in facts.selectors().items() if model.has_experts(layer) else ():
                shape = tuple(model.on_rank[axis] for axis in told["shape"])
                is_float32 = told.get("is_float32") or model.form != "hf"
                spec = TensorSpec(shape, ("F32",) if is_float32 else dtypes, True)
                found.append(PlainTensor(prefix + told[model.form], spec, role, place))
            for role, name in self.cache.names.items() if self.cache else ():
                found.append(PlainTensor(prefix + name, scale, role, place))
        return found

    def _table_spec(self, axis: str) -> TensorSpec:
        return TensorSpec(
            (self.model.on_rank[axis], self.model.on_rank["hidden"]), (self.model.dtype,)
        )

    def specs(self, stage: int) -> dict[str, TensorSpec]:
        """Name -> what every rank of a pipeline stage must hold."""
        specs = {plain.name: plain.spec for plain in self.plain(stage)}
        for layer in range(self.model.layers_per_stage):
            for module in self.modules(layer):
                specs |= {module.full(tensor): spec for tensor, spec in module.specs().items()}
        return specs

    def table(self, role: str, stage: int) -> Tensor:
        """A table [vocab or positions, hidden] without its padding."""
        rows = [rank.tensor(f"{self.model.names[role]}.weight") for rank in self.stages[stage]]
        return torch.cat(rows)[: self.model.rows(role)]


def _slice(name: str) -> int:
    """Number of the expert in the name of a module, such as `mlp.fc[3]`."""
    return int(name.partition("[")[2].removesuffix("]"))

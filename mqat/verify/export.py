"""An exported directory: what it must hold by its configuration, and the tensors themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mqat.verify.served_model import ServedModel
from mqat.verify.storage import Storage, StoredLinear
from mqat.verify.tensor_specs import TensorSpec


@dataclass(frozen=True)
class CacheStorage:
    """A quantized key/value cache.

    Attributes:
        is_float: FP8 E4M3 codes; otherwise INT8.
        names: `key`, `value` -> name in a layer of its scale.
        shape: Of each scale.
    """

    is_float: bool
    names: Mapping[str, str]
    shape: tuple[int, ...] = (1,)


@dataclass(frozen=True)
class Description:
    """What the configuration of a directory says; made by an adapter in `formats/`.

    Attributes:
        model: Sizes and names.
        storage: Full name of a module, as in the files of a stage -> how it is stored.
        cache: None: keys and values are not quantized.
        is_staged: Layer names restart in every stage, so problems must tell the stage.
    """

    model: ServedModel
    storage: Mapping[str, Storage]
    cache: CacheStorage | None = None
    is_staged: bool = False

    def specs(self, stage: int) -> dict[str, TensorSpec]:
        """Name -> what every rank of a pipeline stage must hold."""
        model, names = self.model, self.model.names
        hidden, dtypes = model.on_rank("hidden"), (model.dtype,)
        table = TensorSpec((model.on_rank("vocab"), hidden), dtypes)
        result: dict[str, TensorSpec] = {}
        if stage == 0:
            result[f"{names['embedding']}.weight"] = table
        for layer in range(model.layers_per_stage):
            prefix = model.prefix(layer)
            for norm in model.facts.norms.values():
                spec = TensorSpec((model.on_rank(norm["size"]),), dtypes, True)
                result[f"{prefix}{norm[model.keys.form]}.weight"] = spec
            if self.cache is not None:
                scale = TensorSpec(self.cache.shape, ("F32",), True)
                result |= {prefix + name: scale for name in self.cache.names.values()}
            for module in model.modules:
                for suffix, spec in self.module_specs(prefix, module).items():
                    result[f"{prefix}{module}.{suffix}"] = spec
        if stage == model.pp - 1:
            result[f"{names['final_norm']}.weight"] = TensorSpec((hidden,), dtypes, True)
            if not model.is_tied:
                result[f"{names['lm_head']}.weight"] = table
        return result

    def tensors(self, name: str, module: str) -> dict[str, str]:
        """Tensor of a module, in the words of `storage` -> suffix."""
        bias = {"bias": "bias"} if self.model.has_bias(module) else {}
        return {**self.storage[name].names, **bias}

    def module_specs(self, prefix: str, module: str) -> dict[str, TensorSpec]:
        """Suffix -> what a rank must hold of a module."""
        storage, model = self.storage[prefix + module], self.model
        specs = storage.specs(model.shape(module), model.dtype, model.is_row_parallel(module))
        names = self.tensors(prefix + module, module)
        return {suffix: specs[tensor] for tensor, suffix in names.items()}


@dataclass
class Rank:
    """The tensors of one rank, read one at a time.

    Attributes:
        label: File that problems name where a tensor is missing.
        files: That make up the rank.
        index: Tensor -> file, as an index file claims.
        found: Tensor -> file in which it is; filled by `open`.
    """

    label: str
    files: Sequence[str]
    index: Mapping[str, str] = field(default_factory=dict)
    found: dict[str, str] = field(default_factory=dict)
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


@dataclass(frozen=True)
class Export:
    """A directory with its files open.

    Attributes:
        description: What its configuration says.
        stages: For each pipeline stage, its tensor-parallel ranks.
    """

    description: Description
    stages: Sequence[Sequence[Rank]]

    @property
    def model(self) -> ServedModel:
        """Sizes and names."""
        return self.description.model

    @property
    def num_files(self) -> int:
        """Files with weights."""
        return sum(len(rank.files) for ranks in self.stages for rank in ranks)

    def linear(self, rank: Rank, prefix: str, module: str) -> StoredLinear:
        """One rank's part of a module."""
        name = prefix + module
        tensors = {
            tensor: rank.tensor(f"{name}.{suffix}")
            for tensor, suffix in self.description.tensors(name, module).items()
        }
        return StoredLinear(self.description.storage[name], self.model.shape(module), tensors)

    def by_part(self, module: str, tensor: Tensor) -> dict[str, Tensor]:
        """Rows of one rank's tensor of a module, by role."""
        parts = tensor.split(self.model.rows(module))
        return dict(zip(self.model.modules[module], parts, strict=True))

    def join(self, module: str, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """All ranks' tensors of a module as whole tensors by role, each key/value head once."""
        if self.model.is_row_parallel(module):
            (role,) = self.model.modules[module]
            return {role: torch.cat(list(tensors), dim=1) if tensors[0].dim() == 2 else tensors[0]}
        split = [self.by_part(module, tensor) for tensor in tensors]
        joined = {}
        for role in self.model.modules[module]:
            is_copied = self.model.facts.parts[role].rows == "key_value"
            ranks = split[:: self.model.copies] if is_copied else split
            joined[role] = torch.cat([parts[role] for parts in ranks])
        return joined

    def table(self, name: str, stage: int) -> Tensor:
        """A vocabulary table [vocab, hidden] without its padding."""
        rows = [rank.tensor(f"{self.model.names[name]}.weight") for rank in self.stages[stage]]
        return torch.cat(rows)[: self.model.size("vocab_size")]

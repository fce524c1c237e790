"""Weights under Megatron-Core's names, whoever saved them, read as those of a Hugging Face directory.

Keys of `models/structure.py` stand after a prefix (`model.`, `module.`), for all layers stacked or with
the number of each, gate and up in one tensor or in two (`_w`, `_v`); norms under Transformer Engine's
names or the local ones. Rows of a fused tensor are taken apart as the table lists them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from mqat.checkpoints.megatron_config import Stored, known_norms
from mqat.checkpoints.stored_tensors import finite
from mqat.checkpoints.torch_dist import ChunkedTensors
from mqat.errors import UserError
from mqat.models.decoder import FAMILIES, DecoderConfig
from mqat.models.family import Family
from mqat.models.structure import (
    EMBEDDING,
    OUTPUT_LAYER,
    Linear,
    Norm,
    Table,
    in_layer,
    is_in_layer,
    stacked_key,
)

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_PREFIX = re.compile(rf"((?:(?:model|module)\.)*){re.escape(EMBEDDING.key)}$")
# Of the optimizer, random numbers, Transformer Engine's FP8 histories, rotary frequencies: not weights.
_NO_WEIGHT = re.compile(r"^(optimizer|rng_state|opt_param|rerun_state)|_extra_state|\.inv_freq$")
_HALVES = ("_w", "_v")  # gate, up: Megatron's `singleton_local_shards`
Region = tuple[slice, ...]


def check_family(family: Family, said_by: object) -> None:
    """Refuses a family that `MegatronCheckpoint` has no way to read.

    Raises:
        UserError: It has experts.
    """
    if family.mixture is not None:
        raise UserError(
            f"{said_by}: {family.name} models are not read from checkpoints of Megatron or NeMo; "
            "convert the checkpoint to a Hugging Face directory and import that."
        )


class MegatronCheckpoint:
    """Lazy view of a Megatron checkpoint; same interface as `HuggingFaceCheckpoint`.

    Attributes:
        path: For messages.
        config: The description.

    Args:
        path: As above.
        tensors: Of the checkpoint, by its keys.
        describe: Makes the description of what the tensors say.
        said_by: What describes the model, for messages.
        tokenizer: Where `load_tokenizer` finds one; None: nowhere.

    Raises:
        UserError: Tensors are missing, have no place, or belong to another model.
    """

    def __init__(
        self,
        path: Path,
        tensors: ChunkedTensors,
        describe: Callable[[Stored], DecoderConfig],
        said_by: str,
        tokenizer: Path | TemporaryDirectory[str] | None,
    ) -> None:
        self.path = path
        self._tensors, self._said_by, self._tokenizer = tensors, said_by, tokenizer
        found = [match[1] for match in map(_PREFIX.match, tensors.keys()) if match]
        if len(found) != 1:
            raise UserError(
                f"{path}: {len(found)} tensors are called {EMBEDDING.key}, so this is not one decoder "
                f"of Megatron-Core (its first tensor is {next(iter(tensors.keys()), 'none')!r})."
            )
        self._prefix = found[0]
        weights = {k for k in tensors.keys() if not _NO_WEIGHT.search(k)}
        self._keys = {k.removeprefix(self._prefix): k for k in weights}
        self.config = describe(self._stored())
        self._check()

    @property
    def tokenizer_source(self) -> Path:
        """Where `load_tokenizer` finds the tokenizer.

        Raises:
            UserError: The checkpoint has none.
        """
        if isinstance(self._tokenizer, TemporaryDirectory):  # lives as long as this object
            return Path(self._tokenizer.name)
        if self._tokenizer is None:
            raise UserError(
                f"{self.path}: brings no tokenizer that can be read here; import it with "
                "mqat import --tokenizer DIR, a directory with tokenizer.json or tokenizer.model."
            )
        return self._tokenizer

    def _stored(self) -> Stored:
        """What the tensors say of the model."""
        linears = {linear.name for family in FAMILIES.values() for linear in family.linears}
        norms = {
            norm.name for norm in known_norms() if self._norm_key(norm, "weight", 0) is not None
        }
        biases = {n for n in linears if self._layer_key(f"{n}.bias", 0) is not None}
        rows = self._tensors.shape(self._keys[EMBEDDING.key])[0]
        return Stored(
            frozenset(norms), frozenset(biases), rows, has_head=OUTPUT_LAYER.key in self._keys
        )

    def _layer_key(self, name: str, layer: int) -> tuple[str, Region] | None:
        """Key of a parameter of a layer, and the region of that layer in it; None: it has none."""
        stacked, _, kind = name.rpartition(".")
        key = stacked_key(stacked, kind)
        if key in self._keys:
            return self._keys[key], (slice(layer, layer + 1),)
        key = in_layer(layer, name)
        return (self._keys[key], ()) if key in self._keys else None

    def _norm_key(self, norm: Norm, kind: str, layer: int) -> tuple[str, Region] | None:
        key = norm.key if kind == "weight" else norm.bias_key
        fused = key.removeprefix(stacked_key("", "")[:-1])
        return self._layer_key(fused, layer) or self._layer_key(f"{norm.name}.{kind}", layer)

    def _whole(self, linear: Linear, kind: str, layer: int) -> list[tuple[str, Region]]:
        """Tensors that together hold a parameter of a linear: itself, or its two halves."""
        whole = self._layer_key(f"{linear.name}.{kind}", layer)
        if whole is not None:
            return [whole]
        halves = [self._layer_key(f"{linear.name}.{kind}{half}", layer) for half in _HALVES]
        if linear.separate_parts == len(_HALVES) and None not in halves:
            return [half for half in halves if half is not None]
        raise UserError(
            f"{self.path}: tensor {self._prefix}{in_layer(layer, linear.name)}.{kind} is missing; the "
            f"{self.config.family} model of {self._said_by} has it."
        )

    def _check(self) -> None:
        """Compares every tensor of the checkpoint with the description."""
        model, used = self.config, set[str]()

        def check(key: str, region: Region, shape: Sequence[int]) -> None:
            used.add(key)
            found, dtype = self._tensors.shape(key), self._tensors.dtype(key)
            wanted = (model.num_layers, *shape) if region else tuple(shape)
            bare = key.removeprefix(self._prefix)
            is_table = bare in [table.key for table in model.tables if table.rows == "vocab"]
            is_padded = is_table and found[1:] == wanted[1:] and found[0] >= wanted[0]
            if found != wanted and not is_padded:
                raise UserError(
                    f"{self.path}: tensor {key!r} has shape {found}, but {self._said_by} implies "
                    f"{wanted}; they belong to different models."
                )
            if dtype not in _DTYPES:
                raise UserError(
                    f"{self.path}: tensor {key!r} is {dtype}, which are codes of quantized weights; "
                    "import the unquantized model."
                )

        for key, shape in model.checkpoint_shapes().items():
            if not is_in_layer(key):
                check(self._top(key), (), shape)
        for layer in range(model.num_layers):
            for norm in model.norms:
                for kind in model.architecture.norm_kinds:
                    place = self._norm_key(norm, kind, layer)
                    if place is None:
                        raise UserError(
                            f"{self.path}: the {kind} of {in_layer(layer, norm.name)} is missing; the "
                            f"{model.family} model of {self._said_by} has it."
                        )
                    check(*place, (model.size(norm.size),))
            for linear in model.linears:
                shape = linear.shape(model)
                self._check_linear(check, linear, layer, shape)
        extra = sorted(set(self._keys.values()) - used)
        if extra:
            raise UserError(
                f"{self.path}: {extra[0]!r} and {len(extra) - 1} more tensors have no place in the "
                f"{model.family} model of {self._said_by}, which would compute something else without "
                "them; import a model of a family that is known, with its own description."
            )

    def _check_linear(
        self,
        check: Callable[[str, Region, Sequence[int]], None],
        linear: Linear,
        layer: int,
        shape: tuple[int, int],
    ) -> None:
        kinds = {"weight": shape} | (
            {"bias": shape[:1]} if linear.name in self.config.biases else {}
        )
        for kind, full in kinds.items():
            places = self._whole(linear, kind, layer)
            for key, region in places:
                check(key, region, (full[0] // len(places), *full[1:]))

    def _top(self, key: str) -> str:
        if key not in self._keys:
            raise UserError(
                f"{self.path}: tensor {self._prefix}{key} is missing; the {self.config.family} model of "
                f"{self._said_by} has it."
            )
        return self._keys[key]

    def read(self, name: str, rows: slice, cols: slice | None = None) -> Tensor:
        """Rows, and for matrices columns, of one tensor by its Hugging Face name, as it is stored.

        Raises:
            UserError: There is none, or an element is NaN or infinite.
        """
        module, _, kind = name.rpartition(".")
        family, columns = self.config.architecture, () if cols is None else (cols,)
        last = family.final_norm
        if module == last.hf:
            return self._read(self._top({"weight": last.key, "bias": last.bias_key}[kind]), (rows,))
        for table in family.tables:
            if module == table.hf:
                rows = self._true_rows(table, rows)
                return self._read(self._top(table.key), (rows, *columns))
        layer, short = _split_hf(name, module, family.hf_layer)
        norms = {norm.hf: norm for norm in self.config.norms}
        if short in norms:
            place = self._norm_key(norms[short], kind, layer)
            assert place is not None, name
            return self._read(place[0], (*place[1], rows), len(place[1]))
        for linear in self.config.linears:
            if short in linear.hf_modules():
                return self._read_module(linear, short, kind, layer, rows, columns)
        raise UserError(f"{self.path}: has no tensor {name!r}.")

    def _true_rows(self, table: Table, rows: slice) -> slice:
        """Of a table without its padding."""
        span = range(self.config.size(table.rows))[rows]
        return slice(span.start, span.stop)

    def _read_module(
        self,
        linear: Linear,
        module: str,
        kind: str,
        layer: int,
        rows: slice,
        columns: tuple[slice, ...],
    ) -> Tensor:
        """Of a Hugging Face module, which may hold several parts, or be transposed."""
        if linear.is_transposed_in_hf and columns:
            plain = replace(linear, is_transposed_in_hf=False)
            return self._read_module(plain, module, kind, layer, columns[0], (rows,)).t()
        parts = linear.hf_modules()[module]
        span, first, found = range(linear.rows_of(self.config, parts))[rows], 0, []
        for number in parts:
            end = first + self.config.size(linear.parts[number].rows)
            own = slice(max(span.start, first) - first, min(span.stop, end) - first)
            if own.start < own.stop:
                found.append(self._read_part(linear, number, kind, layer, own, columns))
            first = end
        return found[0] if len(found) == 1 else torch.cat(found)

    def _read_part(
        self,
        linear: Linear,
        number: int,
        kind: str,
        layer: int,
        rows: slice,
        columns: tuple[slice, ...],
    ) -> Tensor:
        places = self._whole(linear, kind, layer)
        if len(places) > 1:
            (key, region), pieces = places[number], [rows]
        else:
            ((key, region),) = places
            pieces = linear.fused_rows(self.config, number, rows)
        found = [self._read(key, (*region, piece, *columns), len(region)) for piece in pieces]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _read(self, key: str, region: Region, leading: int = 0) -> Tensor:
        """A region, without its first dimension where that is the layer's."""
        found = finite(self.path, key, self._tensors.read(key, region))
        return found.squeeze(0) if leading else found


def _split_hf(name: str, module: str, hf_layer: str) -> tuple[int, str]:
    """Layer and name in it, of a module of a Hugging Face layer."""
    before = hf_layer.split("{i}")[0]
    number, _, short = module.removeprefix(before).partition(".")
    if not module.startswith(before) or not number.isdigit():
        raise UserError(f"{name}: not a tensor of a decoder.")
    return int(number), short

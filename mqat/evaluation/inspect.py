"""What is in a checkpoint or an exported directory: one row for each linear and quantized cache."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mqat.checkpoints.manifest import DESCRIPTION
from mqat.checkpoints.reader import CheckpointReader
from mqat.errors import UserError
from mqat.models.structure import CORE_ATTENTION, in_layer, is_in_layer, packed_key
from mqat.quant.scheme import LinearScheme
from mqat.verify.export import CacheStorage, Export, Rank
from mqat.verify.storage import Module
from mqat.verify.verify import read_export

_BIAS = ", bias"  # in the model's dtype, not counted among the bits
COLUMNS = ("file", "linear", "format", "bits", "shape", "weight scales", "input scale")


@dataclass(frozen=True)
class Row:
    """One linear, or a rank's part of one, or one layer's key/value cache.

    Attributes:
        file: Rank file; empty where the whole linear is described.
        linear: Name.
        form: Format of weight (and input), as stored there.
        bits: Per weight, scales included; per cached number.
        shape: (out, in), unpacked; of a cache (heads, head size).
        scale: Weight scales, or those of a cache, or None.
        input_scale: Or None.
    """

    file: str
    linear: str
    form: str
    bits: float
    shape: tuple[int, int]
    scale: Tensor | None = None
    input_scale: Tensor | None = None

    def cells(self) -> tuple[str, ...]:
        """As text, in the order of `COLUMNS`."""
        scale, step = "-", "-"
        if self.scale is not None:
            low, high = float(self.scale.min()), float(self.scale.max())
            scale = f"{low:.3g}" if low == high else f"{low:.3g} .. {high:.3g}"
        if self.input_scale is not None:
            step = f"{float(self.input_scale):.4g}"
        shape = "x".join(map(str, self.shape))
        return (self.file, self.linear, self.form, f"{self.bits:.2f}", shape, scale, step)


def rows(path: Path) -> Iterator[Row]:
    """Rows of a checkpoint, a TensorRT-LLM directory or a Hugging Face directory.

    Raises:
        ValueError: None of these, or a damaged one; says what is wrong.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or directory.")
    if (path / DESCRIPTION).is_file():
        return _checkpoint_rows(path)
    return _export_rows(read_export(path))


def _bits(shape: tuple[int, int], code_bits: int, *others: Tensor | None) -> float:
    extra = sum(8 * t.numel() * t.element_size() for t in others if t is not None)
    return code_bits + extra / (shape[0] * shape[1])


def _checkpoint_rows(path: Path) -> Iterator[Row]:
    reader = CheckpointReader(path)
    for name, table in reader.tables.items():
        shape = (reader.model.vocab_size, reader.model.hidden_size)
        yield _quantized_row(reader, name, table, shape)
    for layer in range(reader.model.num_layers):
        for linear in reader.model.linears_of(layer):
            name = in_layer(layer, linear.name)
            shape, scheme = linear.shape(reader.model), reader.layers.get(name)
            if scheme is None or scheme.weight is None:
                stored = reader.dtype(reader.model.place(linear.key, layer)[0])
                form = f"unquantized {str(stored).removeprefix('torch.')}"
                form += _BIAS * (linear.name in reader.model.biases) + _adapter(reader, name)
                yield Row("", name, form, 8 * stored.itemsize, shape)
                continue
            row = _quantized_row(reader, name, scheme, shape)
            yield replace(row, form=row.form + _BIAS * (linear.name in reader.model.biases))
        name = in_layer(layer, CORE_ATTENTION.name)
        cache, model = reader.kv_cache.get(name), reader.model
        if cache is not None:
            steps = [reader.frozen(name, kind, "scale") for kind in cache.operands]
            shape = (model.num_query_groups, model.head_dim)
            yield _cache_row("", name, cache.tensor.format.name, shape, *steps)


def _adapter(reader: CheckpointReader, name: str) -> str:
    adapters = reader.adapters
    has_one = adapters is not None and name in adapters.names
    return f", adapter of rank {adapters.rank}" if adapters is not None and has_one else ""


def _quantized_row(
    reader: CheckpointReader, name: str, scheme: LinearScheme, shape: tuple[int, int]
) -> Row:
    assert scheme.weight is not None, name
    scale = None
    if not (reader.is_packed and is_in_layer(name)):
        scale = reader.frozen(name, "weight", "scale")[: shape[0]]
    operand, step = scheme.input, None
    if operand is not None and (operand.has_global_scale or not operand.is_dynamic):
        part = "global_scale" if operand.has_global_scale else "scale"
        step = reader.frozen(name, "input", part)
    form = f"{scheme.name}: {scheme.weight.format.name} per {scheme.weight.granularity}"
    if operand is not None:
        kind = "dynamic " if operand.is_dynamic else ""
        form += f", {kind}inputs {operand.format.name}"
    form += _adapter(reader, name)
    if scale is None:
        parts = (part for part in reader.keys() if part.startswith(packed_key(name, "")))
        bits = _bits(shape, 0, *(reader.view(part) for part in parts))
        return Row("", name, f"{form}, packed", bits, shape, None, step)
    # As servers hold them: scales on their own grid (here they are float32), zero points as codes.
    served = scale.to(scheme.weight.scale_dtype)
    bits = _bits(shape, scheme.weight.format.bits, served, step)
    if scheme.weight.is_asymmetric:
        bits += scheme.weight.format.bits * scale.numel() / (shape[0] * shape[1])
    return Row("", name, form, bits, shape, scale, step)


def _cache_row(file: str, name: str, form: str, shape: tuple[int, int], *scales: Tensor) -> Row:
    steps = torch.cat([scale.reshape(1) for scale in scales])
    return Row(file, name, f"cache: {form}", 8, shape, steps)


def _export_rows(export: Export) -> Iterator[Row]:
    for ranks in export.stages:
        for rank in ranks:
            for layer in range(export.model.layers_per_stage):
                yield from (_stored_row(rank, module) for module in export.modules(layer))
                if export.cache is not None:
                    yield _stored_cache_row(export, export.cache, rank, layer)


def _stored_row(rank: Rank, module: Module) -> Row:
    linear, form = rank.linear(module), str(module.storage)
    if not module.storage.bits:
        form += f" {str(linear.tensors['weight'].dtype).removeprefix('torch.')}"
    form += _BIAS * ("bias" in linear.tensors)
    scale = linear.step() if "scale" in linear.tensors else None
    step = linear.tensors.get("input_scale", linear.tensors.get("input_global_scale"))
    stored = [t for name, t in linear.tensors.items() if name not in ("shape", "bias")]
    file = rank.found[module.full("codes" if "codes" in linear.tensors else "weight")]
    return Row(file, module.name, form, _bits(module.shape, 0, *stored), module.shape, scale, step)


def _stored_cache_row(export: Export, cache: CacheStorage, rank: Rank, layer: int) -> Row:
    prefix, model = export.model.prefix(layer), export.model
    names = [prefix + name for name in dict.fromkeys(cache.names.values())]
    attention = prefix + names[0].removeprefix(prefix).partition(".")[0]
    shape = (model.on_rank["key_value"] // model.on_rank["head"], model.on_rank["head"])
    scales = [rank.tensor(name) for name in names]
    return _cache_row(rank.found[names[0]], attention, str(cache), shape, *scales)

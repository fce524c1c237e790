"""What is in a checkpoint or an exported directory: one row for each linear and quantized cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from mqat.checkpoints.manifest import DESCRIPTION
from mqat.checkpoints.reader import CheckpointReader
from mqat.errors import UserError
from mqat.models.structure import CORE_ATTENTION, in_layer, quantizer_key
from mqat.quant.scheme import LinearScheme
from mqat.verify.checks import check_files
from mqat.verify.expected import CACHE_SCALE
from mqat.verify.hf_layout import Storage, all_modules, read_hf_config
from mqat.verify.hf_values import steps_of
from mqat.verify.huggingface import HfDirectory
from mqat.verify.huggingface import check_files as check_hf_files
from mqat.verify.layout import INT4_ALGORITHMS, MODULES, ServedConfig, read_config
from mqat.verify.verify import is_huggingface

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
    return _hf_rows(path) if is_huggingface(path) else _trtllm_rows(path)


def _bits(shape: tuple[int, int], code_bits: int, *others: Tensor | None) -> float:
    extra = sum(8 * t.numel() * t.element_size() for t in others if t is not None)
    return code_bits + extra / (shape[0] * shape[1])


def _checkpoint_rows(path: Path) -> Iterator[Row]:
    reader = CheckpointReader(path)
    for name, table in reader.tables.items():
        shape = (reader.model.vocab_size, reader.model.hidden_size)
        yield _quantized_row(reader, name, table, shape)
    for layer in range(reader.model.num_layers):
        for linear in reader.model.linears:
            name = in_layer(layer, linear.name)
            shape, scheme = linear.shape(reader.model), reader.layers.get(name)
            if scheme is None or scheme.weight is None:
                stored = reader.dtype(linear.key)
                form = f"unquantized {str(stored).removeprefix('torch.')}"
                form += _BIAS * (linear.name in reader.model.biases)
                yield Row("", name, form, 8 * stored.itemsize, shape)
                continue
            row = _quantized_row(reader, name, scheme, shape)
            yield replace(row, form=row.form + _BIAS * (linear.name in reader.model.biases))
        name = in_layer(layer, CORE_ATTENTION.name)
        cache, model = reader.kv_cache.get(name), reader.model
        if cache is not None:
            steps = [reader.read(quantizer_key(name, kind, "scale")) for kind in cache.operands]
            shape = (model.num_query_groups, model.head_dim)
            yield _cache_row("", name, cache.tensor.format.name, shape, *steps)


def _quantized_row(
    reader: CheckpointReader, name: str, scheme: LinearScheme, shape: tuple[int, int]
) -> Row:
    assert scheme.weight is not None, name
    scale = reader.read(quantizer_key(name, "weight", "scale"))[: shape[0]]
    operand, step = scheme.input, None
    if operand is not None and (operand.has_global_scale or not operand.is_dynamic):
        part = "global_scale" if operand.has_global_scale else "scale"
        step = reader.read(quantizer_key(name, "input", part))
    form = f"{scheme.name}: {scheme.weight.format.name} per {scheme.weight.granularity}"
    if operand is not None:
        kind = "dynamic " if operand.is_dynamic else ""
        form += f", {kind}inputs {operand.format.name}"
    bits = _bits(shape, scheme.weight.format.bits, scale, step)
    return Row("", name, form, bits, shape, scale, step)


def _cache_row(file: str, name: str, form: str, shape: tuple[int, int], *scales: Tensor) -> Row:
    steps = torch.cat([scale.reshape(1) for scale in scales])
    return Row(file, name, f"cache: {form}", 8, shape, steps)


def _trtllm_rows(path: Path) -> Iterator[Row]:
    problems: list[str] = []
    config = read_config(path, problems)
    problems += [] if config is None else check_files(path, config)
    if config is None or problems:
        raise UserError(f"{path}: {problems[0]}")
    for rank in range(config.tp * config.pp):
        file = f"rank{rank}.safetensors"
        with safe_open(path / file, framework="pt") as handle:
            for layer in range(config.layers_per_stage):
                for module in MODULES:
                    name = f"transformer.layers.{layer}.{module}"
                    yield _trtllm_row(file, name, handle, config)
                if config.kv_cache is not None:
                    name = f"transformer.layers.{layer}.{CACHE_SCALE}"
                    shape = (config.key_value_heads_per_rank, int(config.raw["head_size"]))
                    scale = handle.get_tensor(name)
                    yield _cache_row(file, name, config.kv_cache, shape, scale)


def _trtllm_row(file: str, name: str, handle: safe_open, config: ServedConfig) -> Row:
    weight = handle.get_slice(f"{name}.weight")
    out, width = weight.get_shape()
    algorithm = config.algorithm_of(name)
    present = set(handle.keys())

    def tensor(suffix: str) -> Tensor | None:
        full = f"{name}.{suffix}"
        return handle.get_tensor(full) if full in present else None

    scale, step = tensor("weights_scaling_factor"), tensor("activation_scaling_factor")
    scale = tensor("per_channel_scale") if scale is None else scale
    is_int4, is_fp4 = algorithm in INT4_ALGORITHMS, algorithm == "NVFP4"
    shape = (2 * out if is_int4 else out, 2 * width if is_fp4 else width)
    widths = {"BF16": 16, "F16": 16, "F32": 32, "I8": 8, "F8_E4M3": 8}
    code_bits = 4 if is_int4 or is_fp4 else widths[weight.get_dtype()]
    others = [tensor(s) for s in ("prequant_scaling_factor", "weights_scaling_factor_2")]
    bits = _bits(shape, code_bits, scale, step, *others)
    if is_fp4 and scale is not None and others[1] is not None:
        scale = scale.float() * others[1]
    form = algorithm or f"unquantized {weight.get_dtype()}"
    form += _BIAS * (f"{name}.bias" in present)
    return Row(file, name, form, bits, shape, scale, step)


def _hf_rows(path: Path) -> Iterator[Row]:
    problems: list[str] = []
    config = read_hf_config(path, problems)
    if config is None:
        raise UserError(f"{path}: {problems[0]}")
    problems, files = check_hf_files(path, config)
    if problems:
        raise UserError(f"{path}: {problems[0]}")
    directory = HfDirectory(path, config, files)
    for name in all_modules(config.raw["num_hidden_layers"]):
        tensors, storage = directory.module(name), config.storage.get(name)
        if storage is None:
            weight = tensors["weight"]
            out, inputs = weight.shape
            width = 8 * weight.element_size()
            kind = str(weight.dtype).removeprefix("torch.")
            form = f"unquantized {kind}" + _BIAS * ("bias" in tensors)
            yield Row(files[f"{name}.weight"], name, form, width, (out, inputs))
            continue
        stored, kind = tensors[storage.weight_name], storage.weight_name
        shape = config.shape_of(name)
        step = tensors.get(storage.input_scale_name or "")
        rest = [t for s, t in tensors.items() if s not in (kind, "weight_shape", "bias")]
        code_bits = 8 * stored.numel() * stored.element_size() // (shape[0] * shape[1])
        bits, scale = _bits(shape, code_bits, *rest), steps_of(tensors, storage)
        form = _form(storage) + _BIAS * ("bias" in tensors)
        yield Row(files[f"{name}.{kind}"], name, form, bits, shape, scale, step)
    for layer in range(config.raw["num_hidden_layers"] if config.cache_scales else 0):
        names = [f"model.layers.{layer}.{name}" for name in config.cache_scales.values()]
        shape = (int(config.raw["num_key_value_heads"]), int(config.raw["head_dim"]))
        scales = [directory.tensor(name) for name in names]
        name = f"model.layers.{layer}.self_attn"
        yield _cache_row(files[names[0]], name, "FP8", shape, *scales)


def _form(storage: Storage) -> str:
    kind = f"fp{storage.bits}" if storage.is_float else f"int{storage.bits}"
    grain = {-1: "tensor", 0: "channel"}.get(storage.group_size, f"group:{storage.group_size}")
    text = f"{kind} per {grain}" + ", zero points" * storage.is_asymmetric
    text += ", packed" * bool(storage.packing)
    return text if storage.input is None else f"{text}, inputs {storage.input}"

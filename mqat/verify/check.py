"""Static checks of an exported directory: no reference, no forward pass, one module at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from mqat.verify.export import Export, Rank
from mqat.verify.storage import StoredLinear
from mqat.verify.tensor_specs import TensorSpec

# (bits, floating-point) -> what the largest code must reach. A calibrated weight reaches its largest
# code somewhere; one that stays below half of it has a scale that is too large by a factor (FP8 codes:
# 448 / 64 leaves room for weights that shrank in training).
_LEAST_REACH = {(8, False): 64.0, (8, True): 64.0, (4, False): 4.0, (4, True): 3.0}
# Of linears that servers fuse, these must be one value; of `scale`, if it is that of a tensor.
_SHARED = ("scale", "global_scale", "range_scale", "input_scale", "input_global_scale")
# Those that are as many as rows, when unpacked.
_BY_ROW = ("weight", "codes", "scale", "bias")


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Equality of bits, so that FP8 codes and signed zeros count."""
    is_alike = a.shape == b.shape and a.dtype == b.dtype
    return is_alike and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )


def header_problems(export: Export) -> Iterator[str]:
    """Tensors that are missing, too many, misplaced, or of another shape or dtype."""
    for number, ranks in enumerate(export.stages):
        specs = export.description.specs(number)
        for rank in ranks:
            yield from (f"{rank.label}: {name} is missing" for name in _missing(specs, rank))
            for name, file in rank.found.items():
                if name not in specs:
                    yield f"{file}: {name} is not expected"
                    continue
                shape, dtype = rank.header(name)
                spec = specs[name]
                if shape != spec.shape or dtype not in spec.dtypes:
                    yield f"{file}: {name} is {dtype} {shape}, expected {spec}"
                if rank.index.get(name, file) != file:
                    yield f"{rank.label}: {name} is in {file}, not in {rank.index[name]}"


def _missing(specs: Mapping[str, TensorSpec], rank: Rank) -> list[str]:
    return [name for name in specs if name not in rank.found]


def value_problems(export: Export) -> Iterator[str]:
    """What cannot be right in the values; headers must be right."""
    model, names = export.model, export.model.names
    for stage, ranks in enumerate(export.stages):
        specs = export.description.specs(stage)
        for name in ("embedding", "final_norm", "lm_head"):
            full = f"{names[name]}.weight"
            if full in specs:
                yield from _tensor_problems(ranks, full, specs[full], "weight")
                yield from _padding_problems(export, ranks, full, specs[full])
        for layer in range(model.layers_per_stage):
            prefix = model.prefix(layer)
            cache, norms = export.description.cache, model.facts.norms.values()
            small = {f"{norm[model.keys.form]}.weight": "weight" for norm in norms}
            small |= dict.fromkeys(cache.names.values() if cache else (), "scale")
            for name, kind in small.items():
                yield from _tensor_problems(ranks, prefix + name, specs[prefix + name], kind)
            scales: dict[str, dict[str, Tensor]] = {}
            for module in model.modules:
                linears = [export.linear(rank, prefix, module) for rank in ranks]
                yield from _module_problems(export, ranks, prefix, module, linears)
                kept = {t: linears[0].tensors.get(t) for t in _SHARED}
                if linears[0].storage.granularity != "tensor":
                    kept["scale"] = None
                scales[module] = {t: value for t, value in kept.items() if value is not None}
            yield from _fused_problems(export, prefix, scales)


def _number_problem(kind: str, tensor: Tensor) -> str | None:
    """What is wrong with the values of a tensor; `kind` is a name of the table of `storage`."""
    values = tensor.float()
    if not values.isfinite().all():
        return "holds NaN or infinity"
    if "scale" in kind and not (values > 0).all():
        return "holds a scale that is not positive"
    if kind == "smoothing" and not (values == 1).all():
        return "is not all ones, but mqat folds smoothing into the weights"
    return None


def _copies_differ(ranks: Sequence[Rank], name: str) -> Iterator[str]:
    """Ranks must hold the same bytes."""
    first = ranks[0].tensor(name)
    for rank in ranks[1:]:
        if not same_bytes(first, rank.tensor(name)):
            yield f"{rank.found[name]}: {name} differs from {ranks[0].found[name]}, must be the same"


def _tensor_problems(
    ranks: Sequence[Rank], name: str, spec: TensorSpec, kind: str
) -> Iterator[str]:
    """Of a tensor outside of linears; `kind`: `weight` or `scale`."""
    for rank in ranks:
        problem = _number_problem(kind, rank.tensor(name))
        if problem is not None:
            yield f"{rank.found[name]}: {name} {problem}"
    if spec.is_replicated:
        yield from _copies_differ(ranks, name)


def _padding_problems(
    export: Export, ranks: Sequence[Rank], name: str, spec: TensorSpec
) -> Iterator[str]:
    if spec.is_replicated:
        return
    for number, rank in enumerate(ranks):
        real = max(export.model.size("vocab_size") - number * spec.shape[0], 0)
        if rank.tensor(name)[real:].any():
            yield f"{rank.found[name]}: {name} has padding rows that are not zero"


def _module_problems(
    export: Export, ranks: Sequence[Rank], prefix: str, module: str, linears: list[StoredLinear]
) -> Iterator[str]:
    name, storage = prefix + module, linears[0].storage
    suffixes = export.description.tensors(name, module)
    specs, is_sound = export.description.module_specs(prefix, module), True
    for tensor, suffix in suffixes.items():
        full = f"{name}.{suffix}"
        for rank, linear in zip(ranks, linears, strict=True):
            problem = _number_problem(tensor, linear.tensors[tensor])
            if problem is not None:
                is_sound = False
                yield f"{rank.found[full]}: {full} {problem}"
        if specs[suffix].is_replicated:
            yield from _copies_differ(ranks, full)
    if "shape" in suffixes and linears[0].tensors["shape"].tolist() != list(linears[0].shape):
        found, expected = linears[0].tensors["shape"].tolist(), list(linears[0].shape)
        yield f"{name}.{suffixes['shape']} is {found}, expected {expected}"
    if not is_sound:
        return
    yield from _copied_head_problems(export, ranks, name, module, linears)
    if "codes" not in suffixes:
        return
    full, reach = f"{name}.{suffixes['codes']}", 0.0
    for rank, linear in zip(ranks, linears, strict=True):
        codes = linear.codes()
        if codes.dtype == torch.int8:
            least, most = (-127, 127) if storage.bits == 8 else (-8, 7)
            least -= storage.bits == 8 and storage.packing != ""  # weight-only: amax is at -128
            low, high = (int(code) for code in codes.aminmax())
            if low < least or high > most:
                worst = low if low < least else high
                yield f"{rank.found[full]}: {full} holds the code {worst}, outside {least}..{most}"
        reach = max(reach, float(linear.code_values().abs().max()))
    if 0 < reach < _LEAST_REACH[storage.bits, storage.is_float]:  # zero: there is none to reach
        where = " on all ranks" * (len(ranks) > 1)
        yield f"{full} uses codes up to {reach:g} only{where}; its scale is too large"


def _copied_head_problems(
    export: Export, ranks: Sequence[Rank], name: str, module: str, linears: list[StoredLinear]
) -> Iterator[str]:
    """With more ranks than key/value heads, the copies of a head must be the same."""
    model, copies = export.model, export.model.copies
    copied = [r for r in model.modules[module] if model.facts.parts[r].rows == "key_value"]
    if copies < 2 or not copied:
        return
    for tensor, suffix in export.description.tensors(name, module).items():
        if tensor not in _BY_ROW or linears[0].tensors[tensor].numel() == 1:
            continue
        parts = []
        for linear in linears:
            unpacked = linear.codes() if tensor == "codes" else linear.tensors[tensor]
            parts.append(export.by_part(module, unpacked))
        for number, rank in enumerate(ranks):
            original = number - number % copies
            if not all(same_bytes(parts[number][r], parts[original][r]) for r in copied):
                full, first = f"{name}.{suffix}", ranks[original]
                yield (
                    f"{rank.found[full]}: {full} holds a copy of a key/value head that differs from "
                    f"{first.found[full]}"
                )


def _fused_problems(
    export: Export, prefix: str, scales: dict[str, dict[str, Tensor]]
) -> Iterator[str]:
    """Scales that differ between linears which servers fuse: those that are one in checkpoints."""
    modules = export.model.modules
    for fused in export.model.facts.fused.values():
        together = [module for module, roles in modules.items() if set(roles) <= set(fused.parts)]
        for first, second in pairwise(together):
            for tensor in scales[first].keys() & scales[second].keys():
                if same_bytes(scales[first][tensor], scales[second][tensor]):
                    continue
                a, b = (
                    f"{prefix}{m}.{export.description.storage[prefix + m].names[tensor]}"
                    for m in (first, second)
                )
                yield f"{b} differs from {a}; fused kernels need one value"

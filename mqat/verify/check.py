"""Static checks of an exported directory: no reference, no forward pass, one module at a time."""

from collections.abc import Iterator, Sequence
from itertools import combinations

import torch
from torch import Tensor

from mqat.verify.export import Export, Rank
from mqat.verify.storage import Module, StoredLinear, TensorSpec

# (bits, floating-point) -> what the largest code must reach. A calibrated weight reaches its largest
# code somewhere; one that stays below half of it has a scale that is too large by a factor (FP8 codes:
# 448 / 64 leaves room for weights that shrank in training).
_LEAST_REACH = {(8, False): 64.0, (8, True): 64.0, (4, False): 4.0, (4, True): 3.0}
# Single numbers, of which linears that servers fuse must have the same.
_SHARED = ("scale", "global_scale", "range_scale", "input_scale", "input_global_scale")


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Equality of bits, so that FP8 codes and signed zeros count."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def header_problems(export: Export) -> Iterator[str]:
    """Tensors that are missing, too many, misplaced, or of another shape or dtype."""
    for stage, ranks in enumerate(export.stages):
        specs = export.specs(stage)
        for rank in ranks:
            yield from (f"{rank.label}: {n} is missing" for n in specs if n not in rank.found)
            for name, file in rank.found.items():
                if rank.index.get(name, file) != file:
                    yield f"{rank.label}: {name} is in {file}, not in {rank.index[name]}"
                shape, dtype = rank.header(name)
                spec = specs.get(name)
                if spec is None:
                    yield f"{file}: {name} is not expected"
                elif shape != spec.shape or dtype not in spec.dtypes:
                    yield f"{file}: {name} is {dtype} {shape}, expected {spec}"


def value_problems(export: Export) -> Iterator[str]:
    """What cannot be right in the values; headers must be right."""
    for stage, ranks in enumerate(export.stages):
        for plain in export.plain(stage):
            tensors, name = [rank.tensor(plain.name) for rank in ranks], plain.name
            kind = "scale" if plain.role in ("key", "value") else "weight"
            yield from _tensor_problems(ranks, name, tensors, plain.spec, kind)
            for number, rank in enumerate(() if plain.spec.is_replicated else ranks):
                real = max(export.model.rows(plain.role) - number * len(tensors[0]), 0)
                if tensors[number][real:].any():
                    yield f"{rank.found[name]}: {name} has padding rows that are not zero"
        for layer in range(export.model.layers_per_stage):
            firsts, reaches = [], []
            for module in export.modules(layer):
                linears = [rank.linear(module) for rank in ranks]
                problems = list(_linear_problems(ranks, linears))
                yield from problems
                if not problems and "codes" in module.suffixes:
                    reaches.append((module, max(_reach(linear) for linear in linears)))
                kept = linears[0].tensors.items()
                firsts.append(StoredLinear(module, {t: v for t, v in kept if t in _SHARED}))
            yield from _fused_problems(export, firsts)
            yield from _reach_problems(export, reaches)


def _tensor_problems(
    ranks: Sequence[Rank], name: str, tensors: Sequence[Tensor], spec: TensorSpec, kind: str
) -> Iterator[str]:
    """Of one tensor on all ranks of a stage; `kind` is a name of the table of `storage`."""
    for rank, tensor in zip(ranks, tensors, strict=True):
        where, values = f"{rank.found[name]}: {name}", tensor.float()
        if not values.isfinite().all():
            yield f"{where} holds NaN or infinity"
        elif "scale" in kind and not (values > 0).all():
            yield f"{where} holds a scale that is not positive"
        elif kind == "smoothing" and not (values == 1).all():
            yield f"{where} is not all ones, but mqat folds smoothing into the weights"
        if spec.is_replicated and not same_bytes(tensor, tensors[0]):
            yield f"{where} differs from {ranks[0].found[name]}, must be the same"


def _linear_problems(ranks: Sequence[Rank], linears: Sequence[StoredLinear]) -> Iterator[str]:
    """Of one module on all ranks of a stage."""
    module, storage = linears[0].module, linears[0].module.storage
    problems: list[str] = []
    for tensor, spec in module.specs().items():
        tensors = [linear.tensors[tensor] for linear in linears]
        problems += _tensor_problems(ranks, module.full(tensor), tensors, spec, tensor)
    yield from problems
    shape = linears[0].tensors.get("shape")
    if shape is not None and shape.tolist() != list(module.shape):
        yield f"{module.full('shape')} is {shape.tolist()}, expected {list(module.shape)}"
    if problems:
        return
    yield from _copied_head_problems(ranks, linears)
    if "codes" not in module.suffixes:
        return
    name = module.full("codes")
    least, most = (-127, 127) if storage.bits == 8 else (-8, 7)
    least -= storage.bits == 8 and bool(storage.packing)  # weight-only grids may reach -128
    for rank, linear in zip(ranks, linears, strict=True):
        values = linear.code_values()
        outside = values[(values < least) | (values > most)]
        if not storage.is_float and len(outside):
            code = int(outside[0])
            yield f"{rank.found[name]}: {name} holds the code {code}, outside {least}..{most}"


def _reach(linear: StoredLinear) -> float:
    """The largest code."""
    return float(linear.code_values().abs().max())


def _owners(export: Export) -> dict[str, str]:
    """Role of a linear -> the linear of checkpoints that it is a part of: servers fuse these."""
    model = export.model
    kinds = [model.facts, *(model.facts_of(layer) for layer in sorted(model.dense_layers)[:1])]
    return {r: name for facts in kinds for name, e in facts.fused.items() for r in e["parts"]}


def _reach_problems(export: Export, reaches: Sequence[tuple[Module, float]]) -> Iterator[str]:
    """Linears of a layer whose codes stay far below the largest one.

    Parts that were fused in training share one scale per tensor, which the largest of them alone has to
    reach; with a scale for each row or group every part reaches its own.
    """
    owners, groups = _owners(export), dict[str, list[tuple[Module, float]]]()
    for module, reach in reaches:
        shares = module.storage.granularity == "tensor"
        key = owners[module.parts[0].role] if shares else module.name
        groups.setdefault(key, []).append((module, reach))
    for group in groups.values():
        storage, reach = group[0][0].storage, max(reach for _, reach in group)
        if 0 < reach < _LEAST_REACH[storage.bits, storage.is_float]:  # zero: there is none to reach
            names = ", ".join(module.full("codes") for module, _ in group)
            word = "uses" if len(group) == 1 else "together use"
            yield f"{names} {word} codes up to {reach:g} only on all ranks; the scale is too large"


def _copied_head_problems(ranks: Sequence[Rank], linears: Sequence[StoredLinear]) -> Iterator[str]:
    """With more ranks than key/value heads, the copies of a head must be the same."""
    module = linears[0].module
    copied = [part.role for part in module.parts if part.rows == "key_value"]
    for tensor in module.suffixes if module.copies > 1 and copied else ():
        served = [li.codes() if tensor == "codes" else li.tensors[tensor] for li in linears]
        if tensor == "smoothing" or served[0].shape[0] != module.shape[0]:
            continue  # not one for each row
        split, name = [module.by_part(t) for t in served], module.full(tensor)
        for number, rank in enumerate(ranks):
            first = number - number % module.copies
            if not all(same_bytes(split[number][role], split[first][role]) for role in copied):
                where, other = rank.found[name], ranks[first].found[name]
                yield f"{where}: {name} holds a copy of a key/value head that differs from {other}"


def _fused_problems(export: Export, linears: Sequence[StoredLinear]) -> Iterator[str]:
    """Single numbers that differ between linears which servers fuse: one linear in checkpoints."""
    owners = _owners(export)
    for a, b in combinations(linears, 2):
        if owners[a.module.parts[0].role] != owners[b.module.parts[0].role]:
            continue
        for tensor in a.tensors.keys() & b.tensors.keys():
            one, other = a.tensors[tensor], b.tensors[tensor]
            if one.numel() == other.numel() == 1 and not same_bytes(one, other):
                first, second = a.module.full(tensor), b.module.full(tensor)
                yield f"{second} differs from {first}; fused kernels need one value"

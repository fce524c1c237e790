"""Every exported tensor, compared bit for bit with what the checkpoint says it must be.

Ranks are joined back into whole tensors (the inverse of what an exporter does), so a swapped,
shifted, mis-scaled or mis-packed tensor cannot pass: codes must be those of the trained weight on
its frozen grid, and every scale the frozen one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mqat.checkpoints.reader import CheckpointReader
from mqat.quant.scheme import LinearScheme
from mqat.verify.check import same_bytes
from mqat.verify.checkpoint_linear import CheckpointLinear
from mqat.verify.export import Export, Rank
from mqat.verify.reference_quant import w4a8_range_scale
from mqat.verify.served_model import ROPE_FACTORS
from mqat.verify.storage import Storage, StoredLinear


def compare_with_checkpoint(export: Export, checkpoint: CheckpointReader) -> Iterator[str]:
    """Problems, each naming the tensor; headers must be right."""
    problems = list(_compare_config(export, checkpoint))
    yield from problems
    if problems:
        return
    model, facts = export.model, export.model.facts
    yield from _compare_top(export, checkpoint)
    for layer in range(checkpoint.model.num_layers):
        stage, local = divmod(layer, model.layers_per_stage)
        ranks, prefix = export.stages[stage], model.prefix(local)
        found = list(_compare_norms(export, ranks[0], checkpoint, prefix, layer))
        found += _compare_cache(export, ranks, checkpoint, prefix, layer)
        for name, fused in facts.fused.items():
            trained = CheckpointLinear(checkpoint, facts, layer, name)
            for module, roles in model.modules.items():
                if set(roles) <= set(fused.parts):
                    linears = [export.linear(rank, prefix, module) for rank in ranks]
                    found += _compare_linear(export, linears, trained, prefix, module)
        where = f"stage {stage}: " if export.description.is_staged else ""
        yield from (where + problem for problem in found)


def _compare_config(export: Export, checkpoint: CheckpointReader) -> Iterator[str]:
    """`config.json` must describe the trained model."""
    trained, model, keys = checkpoint.model, export.model, export.model.keys
    pairs: list[tuple[str, Any, Any]] = [(keys.family, model.facts.family, trained.family)]
    pairs += [(key, model.size(name), getattr(trained, name)) for name, key in keys.sizes.items()]
    pairs += [
        (key, model.number(name), getattr(trained, name)) for name, key in keys.numbers.items()
    ]
    scaling = trained.rope_scaling
    factors = None if scaling is None else {key: scaling[key] for key in ROPE_FACTORS}
    pairs.append((keys.rope_scaling, model.rope_scaling, factors))
    if keys.is_tied is not None:
        pairs.append((keys.is_tied, model.is_tied, trained.tie_word_embeddings))
    for key, served, wanted in pairs:
        if served != wanted:
            yield f"config.json: {key}={served!r}, but the checkpoint has {wanted!r}"
    cache = export.description.cache
    formats = {scheme.tensor.format.is_float for scheme in checkpoint.kv_cache.values()}
    if formats != (set() if cache is None else {cache.is_float}):
        names = {True: "FP8", False: "INT8", None: "unquantized"}
        served = names[None if cache is None else cache.is_float]
        wanted = " and ".join(names[is_float] for is_float in formats) or "unquantized"
        yield f"config.json: kv_cache is {served}, but the checkpoint's is {wanted}"


def _same(name: str, served: Tensor, trained: Tensor) -> Iterator[str]:
    if not same_bytes(served, trained.to(served.dtype)):
        yield f"{name} is not the checkpoint's"


def _compare_top(export: Export, checkpoint: CheckpointReader) -> Iterator[str]:
    """Vocabulary tables and the last norm."""
    served, trained = export.model.names, export.model.facts.names["checkpoint"]
    last = len(export.stages) - 1
    head = "embedding" if checkpoint.model.tie_word_embeddings else "lm_head"
    tables = [("embedding", 0, "embedding"), ("lm_head", last, head)]
    for name, stage, source in tables[: 1 if export.model.is_tied else 2]:
        rows = slice(0, checkpoint.model.vocab_size)
        wanted = checkpoint.read(f"{trained[source]}.weight", (rows,))
        yield from _same(f"{served[name]}.weight", export.table(name, stage), wanted)
    name = f"{served['final_norm']}.weight"
    wanted = checkpoint.read(f"{trained['final_norm']}.weight")
    yield from _same(name, export.stages[last][0].tensor(name), wanted)


def _compare_norms(
    export: Export, rank: Rank, checkpoint: CheckpointReader, prefix: str, layer: int
) -> Iterator[str]:
    facts = export.model.facts
    for norm in facts.norms.values():
        name = f"{prefix}{norm[export.model.keys.form]}.weight"
        key = facts.key(norm["checkpoint"])
        trained = checkpoint.read(key, (slice(layer, layer + 1),))[0]
        yield from _same(name, rank.tensor(name), trained)


def _compare_cache(
    export: Export,
    ranks: Sequence[Rank],
    checkpoint: CheckpointReader,
    prefix: str,
    layer: int,
) -> Iterator[str]:
    cache, facts = export.description.cache, export.model.facts
    module = facts.in_layer(layer, facts.cache["checkpoint"])
    scheme = checkpoint.kv_cache.get(module)
    if (cache is None) != (scheme is None):
        yield f"{prefix}*: the key/value cache is quantized in only one of checkpoint and export"
    if cache is None or scheme is None:
        return
    for kind, suffix in cache.names.items():
        quantizer = "kv" if scheme.is_shared else kind
        frozen = checkpoint.read(f"quantizers.{module}.{quantizer}_scale")
        served = [rank.tensor(prefix + suffix).reshape(1) for rank in ranks]
        if not all(same_bytes(scale, frozen) for scale in served):
            yield f"{prefix}{suffix} is not the frozen scale"


def _serves(storage: Storage, scheme: LinearScheme) -> bool:
    """Whether what is stored can be what was trained; values are compared one by one besides."""
    weight, operand = scheme.weight, scheme.input
    if weight is None or scheme.output is not None:
        return False
    trained: list[object] = [weight.format.bits, weight.format.is_float, str(weight.granularity)]
    trained += [weight.is_asymmetric, weight.has_global_scale]
    served = [storage.bits, storage.is_float, storage.granularity]
    if [*served, storage.is_asymmetric, storage.has_two_levels] != trained:
        return False
    if operand is None or storage.input is None:
        return operand is None and storage.input is None
    step = "static" if not operand.is_dynamic else str(operand.granularity).split(":")[0]
    step = step.replace("group", "block")
    kind = f"fp{operand.format.bits}" if operand.format.is_float else f"int{operand.format.bits}"
    return storage.input == f"{step} {'u' * operand.is_asymmetric}{kind}"


def _compare_linear(
    export: Export,
    linears: list[StoredLinear],
    trained: CheckpointLinear,
    prefix: str,
    module: str,
) -> Iterator[str]:
    """One module over its ranks against the trained linear that it is a part of, or the whole."""
    name, scheme, storage = prefix + module, trained.scheme, linears[0].storage

    def matches(served: list[Tensor], whole: Tensor) -> bool:
        joined, parts = export.join(module, served), trained.by_part(whole)
        return all(same_bytes(joined[role], parts[role]) for role in joined)

    def differs(tensor: str, whole: Tensor, what: str) -> Iterator[str]:
        served = [linear.tensors[tensor] for linear in linears]
        if not matches(served, whole.to(served[0].dtype)):
            yield f"{name}.{export.description.tensors(name, module)[tensor]} is not the {what}"

    bias = trained.bias()
    if ("bias" in linears[0].tensors) != (bias is not None):
        yield f"{name}.bias is in only one of checkpoint and export"
    elif bias is not None:
        yield from differs("bias", bias, "checkpoint's")
    if (scheme is not None) != bool(storage.bits):
        yield f"{name}: quantized in only one of checkpoint and export"
    elif scheme is None:
        yield from differs("weight", trained.weight, "checkpoint's")
    elif not _serves(storage, scheme):
        yield f"{name}: served as {storage}, trained as {scheme.name}"
    elif storage.is_reloaded:
        yield from differs("weight", trained.values(), "checkpoint's weight on its grid")
    else:
        if not matches([linear.codes() for linear in linears], trained.codes):
            yield f"{name}.{storage.weight_name} is not the checkpoint's weight on its grid"
        yield from _compare_scales(name, linears, trained, matches)


def _compare_scales(
    name: str,
    linears: list[StoredLinear],
    trained: CheckpointLinear,
    matches: Callable[[list[Tensor], Tensor], bool],
) -> Iterator[str]:
    """Every scale and zero point must be the frozen one."""
    storage, frozen = linears[0].storage, trained.frozen("weight_scale")
    served = [linear.scale() for linear in linears]
    if storage.has_two_levels:
        served = [scale * trained.frozen("weight_global_scale") for scale in served]
    is_one = storage.granularity == "tensor"
    same = all(same_bytes(s, frozen) for s in served) if is_one else matches(served, frozen)
    if not same:
        yield f"{name}.{storage.names['scale']} is not the frozen scale"
    if storage.is_asymmetric:
        zeros = trained.frozen("weight_zero_point") - (1 << storage.bits - 1)
        if not matches([linear.zero_point() for linear in linears], zeros.to(torch.int8)):
            yield f"{name}.{storage.names['zero_point']} is not the frozen zero point"
    for tensor, wanted in _wanted_numbers(storage, trained).items():
        if not all(same_bytes(linear.tensors[tensor].reshape(1), wanted) for linear in linears):
            yield f"{name}.{storage.names[tensor]} is not the frozen scale"


def _wanted_numbers(storage: Storage, trained: CheckpointLinear) -> Mapping[str, Tensor]:
    """What single numbers must be, of those that are stored."""
    wanted = {}
    for tensor, quantizer in (
        ("global_scale", "weight_global_scale"),
        ("input_global_scale", "input_global_scale"),
        ("input_scale", "input_scale"),
    ):
        if tensor in storage.names:
            value = trained.frozen(quantizer)
            wanted[tensor] = 1 / value if storage.is_reciprocal and "global" in tensor else value
    if "range_scale" in storage.names:
        wanted["range_scale"] = w4a8_range_scale(trained.frozen("weight_scale"))
    return wanted

"""Every exported tensor, compared bit for bit with what the checkpoint says it must be.

Ranks are joined back into whole tensors (the inverse of what an exporter does), so a swapped,
shifted, mis-scaled or mis-packed tensor cannot pass: codes must be those of the trained weight on
its frozen grid, and every scale the frozen one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mqat.checkpoints.reader import CheckpointReader
from mqat.quant.scheme import LinearScheme
from mqat.verify.check import same_bytes
from mqat.verify.checkpoint_linear import CheckpointLinear
from mqat.verify.export import Export, Rank
from mqat.verify.reference_quant import expand, w4a8_range_scale
from mqat.verify.served_model import NUMBERS, ROPE_FACTORS, SIZES
from mqat.verify.storage import Storage, StoredLinear

# Single number of a module -> what it is made of in the checkpoint.
_NUMBERS = {
    "global_scale": "weight_global_scale", "input_global_scale": "input_global_scale",
    "input_scale": "input_scale", "range_scale": "weight_scale",
}  # fmt: skip


def compare_with_checkpoint(export: Export, checkpoint: CheckpointReader) -> Iterator[str]:
    """Problems, each naming the tensor; headers must be right."""
    problems = list(_compare_config(export, checkpoint))
    yield from problems or _compare_tables(export, checkpoint)
    facts, per_stage = export.model.facts, export.model.layers_per_stage
    for layer in () if problems else range(checkpoint.model.num_layers):
        stage, local = divmod(layer, per_stage)
        ranks, modules = export.stages[stage], export.modules(local)
        found = list(_compare_small(export, ranks, checkpoint, export.model.prefix(local), layer))
        for name, fused in facts.fused.items():
            trained = CheckpointLinear(checkpoint, facts, layer, name)
            for module in modules:
                if module.parts[0].role in fused.parts:
                    served = [rank.linear(module) for rank in ranks]
                    found += _Comparison(served, trained).problems()
        where = f"stage {stage}: " if export.is_staged else ""
        yield from (where + problem for problem in found)


def _compare_config(export: Export, checkpoint: CheckpointReader) -> Iterator[str]:
    """`config.json` must describe the trained model."""
    trained, model = checkpoint.model, export.model
    names = [*SIZES, *NUMBERS, "head_dim", *{"tie_word_embeddings"} & model.keys.keys()]
    pairs: list[tuple[str, Any, Any]] = [(n, model.value(n), getattr(trained, n)) for n in names]
    pairs.append(("family", model.facts.family, trained.family))
    scaling = trained.rope_scaling
    factors = None if scaling is None else {key: scaling[key] for key in ROPE_FACTORS}
    pairs.append(("rope_scaling", model.rope_scaling, factors))
    for name, served, wanted in pairs:
        if served != wanted:
            key = model.keys[name]
            yield f"config.json: {key}={served!r}, but the checkpoint has {wanted!r}"
    caches = sorted({scheme.name.upper() for scheme in checkpoint.kv_cache.values()})
    if caches != ([str(export.cache)] if export.cache else []):
        yield f"config.json: kv_cache is {export.cache}, but the checkpoint has {caches}"


def _same(name: str, served: Tensor, trained: Tensor) -> Iterator[str]:
    if not same_bytes(served, trained.to(served.dtype)):
        yield f"{name} is not the checkpoint's"


def _compare_tables(export: Export, checkpoint: CheckpointReader) -> Iterator[str]:
    """Vocabulary tables and the last norm."""
    served, trained = export.model.names, export.model.facts.names["checkpoint"]
    head = "embedding" if checkpoint.model.tie_word_embeddings else "lm_head"
    tables = [("embedding", 0, "embedding"), ("lm_head", -1, head)]
    for role, stage, source in tables[: 1 if export.model.is_tied else 2]:
        rows = slice(0, checkpoint.model.vocab_size)
        wanted = checkpoint.read(f"{trained[source]}.weight", (rows,))
        yield from _same(f"{served[role]}.weight", export.table(role, stage), wanted)
    name = f"{served['final_norm']}.weight"
    wanted = checkpoint.read(f"{trained['final_norm']}.weight")
    yield from _same(name, export.stages[-1][0].tensor(name), wanted)


def _compare_small(
    export: Export, ranks: Sequence[Rank], checkpoint: CheckpointReader, prefix: str, layer: int
) -> Iterator[str]:
    """Norms and cache scales of a layer; `prefix` is of its names in the export."""
    facts = export.model.facts
    for norm in facts.norms.values():
        name = f"{prefix}{norm[export.model.form]}.weight"
        trained = checkpoint.read(facts.key(norm["checkpoint"]), (slice(layer, layer + 1),))[0]
        yield from _same(name, ranks[0].tensor(name), trained)
    cache, module = export.cache, facts.key(f"{layer}.{facts.cache['checkpoint']}")
    scheme = checkpoint.kv_cache.get(module)
    if (cache is None) != (scheme is None):
        yield f"{prefix}*: the key/value cache is quantized in only one of checkpoint and export"
    for kind, suffix in cache.names.items() if cache and scheme else ():
        quantizer = "kv" if scheme is not None and scheme.is_shared else kind
        frozen = checkpoint.read(f"quantizers.{module}.{quantizer}_scale")
        if not all(same_bytes(r.tensor(prefix + suffix).reshape(1), frozen) for r in ranks):
            yield f"{prefix}{suffix} is not the frozen scale"


def _serves(storage: Storage, scheme: LinearScheme) -> bool:
    """Whether what is stored can be what was trained; values are compared one by one besides."""
    weight, operand = scheme.weight, scheme.input
    if weight is None or scheme.output is not None:
        return False
    trained = (weight.format.bits, weight.format.is_float, str(weight.granularity))
    levels = (weight.is_asymmetric, weight.has_global_scale)
    stored = ("zero_point" in storage.names, "global_scale" in storage.names)
    if (storage.bits, storage.is_float, storage.granularity, *stored) != (*trained, *levels):
        return False
    if operand is None:
        return storage.input is None
    step = "static" if not operand.is_dynamic else str(operand.granularity).split(":")[0]
    step = step.replace("group", "block")
    kind = f"fp{operand.format.bits}" if operand.format.is_float else f"int{operand.format.bits}"
    return storage.input == f"{step} {'u' * operand.is_asymmetric}{kind}"


@dataclass(frozen=True)
class _Comparison:
    """One module over the ranks of a stage, and the trained linear that holds its parts."""

    served: Sequence[StoredLinear]
    trained: CheckpointLinear

    def problems(self) -> Iterator[str]:
        """What differs, bit for bit."""
        module, trained = self.served[0].module, self.trained
        scheme, storage, bias = trained.scheme, module.storage, trained.bias()
        if ("bias" in module.suffixes) != (bias is not None):
            yield f"{module.name}.bias is in only one of checkpoint and export"
        elif bias is not None:
            yield from self._compare("bias", bias, "checkpoint's")
        if (scheme is not None) != bool(storage.bits):
            yield f"{module.name}: quantized in only one of checkpoint and export"
        elif scheme is None:
            yield from self._compare("weight", trained.weight, "checkpoint's")
        elif not _serves(storage, scheme):
            yield f"{module.name}: served as {storage}, trained as {scheme.name}"
        elif storage.is_reloaded:
            steps = expand(trained.frozen("weight_scale"), storage.granularity, module.width)
            values = trained.codes.float() * steps
            yield from self._compare("weight", values, "checkpoint's weight on its grid")
        else:
            codes = [linear.codes() for linear in self.served]
            if not self._matches(codes, trained.codes):
                yield f"{module.full('codes')} is not the checkpoint's weight on its grid"
            yield from self._compare_scales()

    def _matches(self, served: list[Tensor], whole: Tensor) -> bool:
        """Whether the ranks' tensors are rows of a whole one, cut over TP along rows or columns."""
        joined, parts = self.served[0].module.join(served), self.trained.by_part(whole)
        return all(same_bytes(joined[role], parts[role]) for role in joined)

    def _compare(self, tensor: str, whole: Tensor, what: str) -> Iterator[str]:
        served = [linear.tensors[tensor] for linear in self.served]
        if not self._matches(served, whole.to(served[0].dtype)):
            yield f"{self.served[0].module.full(tensor)} is not the {what}"

    def _compare_scales(self) -> Iterator[str]:
        """Every scale and zero point must be the frozen one."""
        module, frozen = self.served[0].module, self.trained.frozen
        scales, names = [linear.scale() for linear in self.served], module.storage.names
        if "global_scale" in names:
            scales = [scale * frozen("weight_global_scale") for scale in scales]
        is_one, wanted = module.storage.granularity == "tensor", frozen("weight_scale")
        same = (
            (same_bytes(s, wanted) for s in scales) if is_one else (self._matches(scales, wanted),)
        )
        if not all(same):
            yield f"{module.full('scale')} is not the frozen scale"
        if "zero_point" in names:
            zeros = frozen("weight_zero_point") - (1 << module.storage.bits - 1)
            served = [linear.zero_point() for linear in self.served]
            if not self._matches(served, zeros.to(torch.int8)):
                yield f"{module.full('zero_point')} is not the frozen zero point"
        for tensor in names.keys() & _NUMBERS.keys():
            number = frozen(_NUMBERS[tensor])
            if tensor == "range_scale":
                number = w4a8_range_scale(number)
            elif "global" in tensor and module.storage.is_reciprocal:
                number = 1 / number
            if not all(same_bytes(li.tensors[tensor].reshape(1), number) for li in self.served):
                yield f"{module.full(tensor)} is not the frozen scale"

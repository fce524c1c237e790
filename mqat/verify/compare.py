"""Every exported tensor, compared bit for bit with what the checkpoint says it must be.

Ranks are joined back into whole tensors (the inverse of what an exporter does), so a swapped,
shifted, mis-scaled or mis-packed tensor cannot pass: codes must be those of the trained weight on
its frozen grid, and every scale the frozen one.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mqat.checkpoints.reader import CheckpointReader
from mqat.quant.scheme import LinearScheme
from mqat.verify.check import same_bytes
from mqat.verify.checkpoint_linear import CheckpointLinear, layer_tensor
from mqat.verify.export import Export, PlainTensor, Rank
from mqat.verify.facts import Facts, read_facts
from mqat.verify.reference_quant import expand, w4a8_range_scale
from mqat.verify.served_model import NUMBERS, SIZES, ServedModel
from mqat.verify.storage import Storage, StoredLinear


def compare_with_checkpoint(export: Export, checkpoint: CheckpointReader) -> Iterator[str]:
    """Problems, each naming the tensor; headers must be right."""
    problems = list(_compare_config(export, checkpoint))
    yield from problems
    per_stage = export.model.layers_per_stage
    for stage, ranks in enumerate(() if problems else export.stages):
        where = f"stage {stage}: " if export.is_staged else ""
        found = [
            _compare_plain(ranks, checkpoint, plain, export.model) for plain in export.plain(stage)
        ]
        for local in range(per_stage):
            found += _compare_layer(export, checkpoint, ranks, stage * per_stage + local, local)
        yield from (where + problem for problems in found for problem in problems)


def _compare_layer(
    export: Export, checkpoint: CheckpointReader, ranks: Sequence[Rank], layer: int, local: int
) -> Iterator[Iterator[str]]:
    """Problems of each linear of a layer, which is `local` in its stage."""
    facts = export.model.facts_of(local)
    for name, fused in facts.fused.items():
        trained = CheckpointLinear(checkpoint, facts, layer, name)
        for module in export.modules(local):
            if module.parts[0].role in fused["parts"]:
                served = [rank.linear(module) for rank in ranks]
                yield _Comparison(served, trained).problems()


def _compare_config(export: Export, checkpoint: CheckpointReader) -> Iterator[str]:
    """`config.json` must describe the trained model."""
    trained, model = checkpoint.model, export.model
    has_heads = trained.normalizes_heads and "query_norm" in read_facts(model.facts.family).norms
    numbers = [name for name in NUMBERS if name in model.keys]
    names = [*SIZES, *numbers, "head_dim", *{"tie_word_embeddings"} & model.keys.keys()]
    pairs: list[tuple[str, Any, Any]] = [(n, model.value(n), getattr(trained, n)) for n in names]
    pairs += [
        (n, model.value(n), getattr(trained, n)) for n in model.facts.experts.get("config", ())
    ]
    if model.facts.experts and model.normalizes != trained.normalizes_expert_weights:
        yield f"config.json: weights of experts add up to one: {model.normalizes}, trained otherwise"
    pairs += [
        ("family", model.facts.family, trained.family),
        ("layers without experts", sorted(model.dense_layers), [*trained.dense_layers]),
        ("norms of query and key heads", "query_norm" in model.facts.norms, has_heads),
        ("scale of experts' weights", model.expert_weight_scale, trained.expert_weight_scale),
        ("size of shared experts", model.on_rank.get("shared", 0) * model.tp,
         trained.shared_intermediate_size),
    ]  # fmt: skip
    for name, served, wanted in pairs:
        if served != wanted:
            key = model.keys.get(name, name)
            yield f"config.json: {key}={served!r}, but the checkpoint has {wanted!r}"
    yield from _compare_positions(model, checkpoint)
    caches = sorted({scheme.name.upper() for scheme in checkpoint.kv_cache.values()})
    if caches != ([str(export.cache)] if export.cache else []):
        yield f"config.json: kv_cache is {export.cache}, but the checkpoint has {caches}"


def _compare_positions(model: ServedModel, checkpoint: CheckpointReader) -> Iterator[str]:
    """Angles, windows and caps, by the checkpoint's names for them."""
    trained, served = checkpoint.model, model.positions
    scaling = dict(trained.rope_scaling or {})
    scaling = {"kind": scaling.pop("rope_type"), **scaling} if scaling else {}
    window, windowed = trained.sliding_window, frozenset(trained.windowed_layers)
    reaches_all = window is not None and window >= served.longest
    if reaches_all and served.window is None and trained.windowed_rope_theta is None:
        window, windowed = None, frozenset()
    wanted: dict[str, tuple[Any, Any]] = {
        model.keys.get("rope_scaling", "rope_scaling"): (dict(served.scaling), scaling),
        "rotary_fraction (channels)": (served.rotated, trained.rotary_channels),
        "sliding_window": (served.window if served.windowed else None, window),
        "windowed_layers": (sorted(served.windowed), sorted(windowed)),
        "windowed_rope_theta": (served.windowed_base, trained.windowed_rope_theta),
        "attention_softcap": (served.score_cap, trained.attention_softcap),
        "logit_softcap": (served.logit_cap, trained.logit_softcap),
    }
    for name, (found, expected) in wanted.items():
        if found != expected:
            yield f"config.json: {name}={found!r}, but the checkpoint has {expected!r}"
    if not math.isclose(served.score_scale, trained.score_scale, rel_tol=1e-6):
        yield (
            f"config.json: scores are scaled by {served.score_scale}, but the checkpoint has "
            f"{trained.score_scale}"
        )


def _compare_plain(
    ranks: Sequence[Rank], checkpoint: CheckpointReader, plain: PlainTensor, model: ServedModel
) -> Iterator[str]:
    """A table, without its padding; a norm; or a scale of a cache."""
    facts = model.facts
    served = [rank.tensor(plain.name) for rank in ranks]
    if plain.layer is None and plain.role != "final_norm":
        is_tied = plain.role == "lm_head" and checkpoint.model.tie_word_embeddings
        key = facts.names["checkpoint"]["embedding" if is_tied else plain.role] + ".weight"
        real = slice(0, model.rows(plain.role))
        whole, wanted = torch.cat(served)[real], checkpoint.read(key, (real,))
    elif plain.role in facts.selectors():
        assert plain.layer is not None, "layers have them"
        name, whole = facts.selectors()[plain.role]["checkpoint"], served[0]
        wanted = layer_tensor(checkpoint, facts, plain.layer, name)
    elif plain.layer is None or plain.role in facts.norms:
        own = facts if plain.layer is None else model.facts_of(plain.layer)
        whole, wanted = served[0], _trained_norm(checkpoint, plain, own)
        less = ("checkpoint" in facts.one_less) - (model.form in facts.one_less)
        if less and plain.kind == "weight":
            wanted = wanted.float() + less
    else:
        module = facts.key(f"{plain.layer}.{facts.cache['checkpoint']}")
        scheme, whole = checkpoint.kv_cache.get(module), served[0].reshape(1)
        if scheme is None:
            yield f"{plain.name}: the checkpoint's cache is not quantized in this layer"
            return
        quantizer = "kv" if scheme.is_shared else plain.role
        wanted = checkpoint.frozen(module, quantizer, "scale")
    if not same_bytes(whole, wanted.to(whole.dtype)):
        yield f"{plain.name} is not the checkpoint's"


def _trained_norm(checkpoint: CheckpointReader, plain: PlainTensor, facts: Facts) -> Tensor:
    """A norm's weight or bias in the checkpoint: the last one's, or one of a layer."""
    if plain.layer is None:
        return checkpoint.read(f"{facts.names['checkpoint'][plain.role]}.{plain.kind}")
    name = facts.norms[plain.role]["checkpoint"].removesuffix("weight") + plain.kind
    return layer_tensor(checkpoint, facts, plain.layer, name)


def _serves(storage: Storage, scheme: LinearScheme) -> bool:
    """Whether what is stored can be what was trained; values are compared one by one besides."""
    weight, operand = scheme.weight, scheme.input
    if weight is None or scheme.output is not None:
        return False
    trained = [weight.format.bits, weight.format.is_float, str(weight.granularity)]
    flags = {"zero_point": weight.is_asymmetric, "global_scale": weight.has_global_scale}
    stored: list[object] = [storage.bits, storage.is_float, storage.granularity]
    if stored != trained or any((t in storage.names) != flag for t, flag in flags.items()):
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
            steps = expand(trained.frozen("weight_scale"), storage.granularity, module.shape[1])
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
            all(same_bytes(s, wanted) for s in scales) if is_one else self._matches(scales, wanted)
        )
        if not same:
            yield f"{module.full('scale')} is not the frozen scale"
        if "zero_point" in names:
            zeros = frozen("weight_zero_point") - (1 << module.storage.bits - 1)
            served = [linear.zero_point() for linear in self.served]
            if not self._matches(served, zeros.to(torch.int8)):
                yield f"{module.full('zero_point')} is not the frozen zero point"
        sources = {"global_scale": "weight_global_scale", "range_scale": "weight_scale"}
        for tensor in names.keys() & {"input_scale", "input_global_scale", *sources}:
            number = frozen(sources.get(tensor, tensor))
            if tensor == "input_scale" and module.shares_input_scale:
                number = torch.stack([x.frozen(tensor) for x in self.trained.of_all_experts()])
                number = number.amax(dim=0)
            if tensor == "range_scale":
                number = w4a8_range_scale(number)
            elif "global" in tensor and module.storage.is_reciprocal:
                number = 1 / number
            if not all(same_bytes(li.tensors[tensor].reshape(1), number) for li in self.served):
                yield f"{module.full(tensor)} is not the frozen scale"

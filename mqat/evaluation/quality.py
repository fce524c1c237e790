"""How well each linear and cache survives its quantization: signal to noise, clipping, outlier channels.

Every module is run twice on the input it meets in the quantized model, with its quantizers and without:

    SQNR = 10 log10(sum y² / sum (y - y_q)²)  dB        of operands, and of the output over real tokens

A bit is worth 6 dB. Sums and maxima are merged over ranks in one collective each, so that the report is
the same on every layout, up to the order in which floats are added.

| key in the JSON                     | meaning                                                         |
|-------------------------------------|-----------------------------------------------------------------|
| `version`                           | of this format: 1                                               |
| `linears[].layer, module`           | number and name in the layer; of a table null and its name      |
| `linears[].output_sqnr_db`          | null: exact                                                     |
| `linears[].weight, input, output`   | null if not quantized; else `format`, `amax`, `clip_rate`,      |
|                                     | `scale`, and `sqnr_db` of the operand (an output's: of all)     |
| `linears[].outliers`                | channels with an amax above `OUTLIER_RATIO` x the median's      |
| `caches[].output_sqnr_db`           | of an attention that reads a quantized cache                    |
| `linears[].is_idle`                 | of an expert alone: no token reached it, so that nothing but    |
|                                     | its weight has figures                                          |
| `mixtures[].layer, module`          | number, and name of a linear in each expert of that layer       |
| `mixtures[].experts, idle`          | how many, and the numbers of those that no token reached        |
| `mixtures[].output_sqnr_db`         | `worst` and `median` of the others; null: exact                 |
| `mixtures[].worst`                  | name of the linear among `linears`                              |
| `caches[].kv`, or `key` and `value` | as operands of linears                                          |
| `about`                             | added where a report is written: `algorithm`, `checkpoint`,     |
|                                     | `stage`, `text`, `tokens`, `date`, and what had been done:      |
|                                     | `calibrator`, `recipes` by linear, `is_trained`                 |
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mqat.errors import UserError
from mqat.evaluation.sqnr_hooks import CLIPPED, COUNT, NOISE, SIGNAL, SqnrHooks, operand_sums
from mqat.models.structure import is_expert, is_in_layer, split_name
from mqat.parallel.attention import KvCacheAttention
from mqat.parallel.experts import following_tokens
from mqat.parallel.linear import QuantizedLinear
from mqat.parallel.quantized_module import (
    QuantizedModule,
    quantized_modules,
    sharing_statistics,
)
from mqat.parallel.reduce import all_reduce_fused_
from mqat.quant.quantizer import Quantizer
from mqat.runtime.groups import gathered

VERSION = 1
OUTLIER_RATIO = 10.0
_WORST = 5  # outlier channels that are named


def _decibel(signal: float, noise: float) -> float | None:
    return 10 * math.log10(signal / noise) if noise > 0 and signal > 0 else None


def _scale_range(quantizer: Quantizer) -> Tensor:
    """-smallest and largest frozen scale, float32 (2,): both merge by MAX."""
    scale = quantizer.frozen_tensors.get("scale", quantizer.frozen_tensors.get("global_scale"))
    if scale is None or not scale.numel():
        return torch.full((2,), -math.inf, device=quantizer.scale.device)
    return torch.stack([-scale.min(), scale.max()])


def _operand(quantizer: Quantizer, sums: Tensor, amax: Tensor, ends: Tensor) -> dict[str, Any]:
    scheme, values = quantizer.scheme, sums.tolist()
    low, high = -float(ends[0]), float(ends[1])
    return {
        "format": f"{scheme.format.name} per {scheme.granularity}",
        "amax": float(amax),
        "clip_rate": values[CLIPPED] / max(values[COUNT], 1.0),
        "scale": [low, high] if math.isfinite(high) else None,
        "sqnr_db": _decibel(values[SIGNAL], values[NOISE]),
    }


def _outliers(amax: Tensor) -> dict[str, Any]:
    ratios = amax / amax.median().clamp_min(1e-20)
    order = torch.argsort(ratios, descending=True, stable=True)[:_WORST]
    worst = [[int(i), round(float(ratios[i]), 2)] for i in order if ratios[i] > OUTLIER_RATIO]
    return {"count": int((ratios > OUTLIER_RATIO).sum()), "worst": worst}


def _weight_figures(
    modules: Mapping[str, QuantizedModule], watched: Mapping[str, SqnrHooks]
) -> None:
    """Adds each quantized weight's sums and maximum to what was watched."""
    for name, module in modules.items():
        quantizer = module.quantizers.get("weight")
        if quantizer is not None and isinstance(module, QuantizedLinear):
            weight = module.merged_weight()
            watched[name].sums["weight"] = operand_sums(weight, quantizer)
            watched[name].maxima["weight"] = weight.abs().amax().float().reshape(1)


def quality_report(
    chunks: list[Any], run_batches: Callable[[], None], *, group: dist.ProcessGroup
) -> dict[str, Any]:
    """Runs the batches through a calibrated model and measures every quantized linear and cache.

    Args:
        chunks: Model chunks of this rank.
        run_batches: Forward passes (all ranks); a rank without batches just returns.
        group: TP x DP x CP of this pipeline stage.

    Returns:
        The table at the top of this module as plain data, in model order, on every rank.

    Raises:
        ValueError: Nothing is quantized, no token reached a module (or any expert of a layer), or one is
            not finite; on every rank.
    """
    modules = {
        name: module
        for name, module in quantized_modules(chunks).items()
        if isinstance(module, QuantizedLinear | KvCacheAttention) and module.quantizers
    }
    watched = {name: SqnrHooks(module) for name, module in modules.items()}
    with ExitStack() as stack:
        stack.enter_context(following_tokens(chunks))
        for hooks in watched.values():
            stack.enter_context(hooks.attach())
        run_batches()
    with torch.no_grad():
        _weight_figures(modules, watched)
    ends = {
        name: {kind: _scale_range(q) for kind, q in module.quantizers.items()}
        for name, module in modules.items()
    }
    for names, sharing in sharing_statistics(modules, group):
        part = [watched[name] for name in names]
        totals = [t for w in part for t in (*w.sums.values(), w.tokens)]
        maxima = [amax for w in part for amax in w.maxima.values()]
        maxima += [pair for name in names for pair in ends[name].values()]
        for shared in sharing:
            all_reduce_fused_(totals, dist.ReduceOp.SUM, shared)
            all_reduce_fused_(maxima, dist.ReduceOp.MAX, shared)
    own = {name: _entry(name, w, ends[name]) for name, w in watched.items()}
    found: dict[str, Any] = {}
    for stage in gathered(own):
        found |= stage
    return _checked(found)


def _entry(name: str, watched: SqnrHooks, ends: Mapping[str, Tensor]) -> dict[str, Any]:
    sums, maxima, module = watched.sums, watched.maxima, watched.module
    signal, noise = sums["output"][[SIGNAL, NOISE]].tolist()
    is_linear = isinstance(module, QuantizedLinear)
    kinds = ("weight", "input", "output") if is_linear else tuple(module.quantizers)
    operands = {
        kind: _operand(module.quantizers[kind], sums[kind], maxima[kind], ends[kind])
        if kind in module.quantizers
        else None
        for kind in kinds
    }
    layer, inner = split_name(name) if is_in_layer(name) else (None, name)
    entry = {
        "name": name,
        "layer": layer,
        "module": inner,
        "tokens": float(watched.tokens),
        "is_finite": all(bool(values[: COUNT + 1].isfinite().all()) for values in sums.values()),
        "output_sqnr_db": _decibel(signal, noise),
        **operands,
    }
    if is_linear:
        channels = maxima["channels"]
        entry |= {"input_amax": float(channels.amax()), "outliers": _outliers(channels)}
    if is_expert(name):
        entry["is_idle"] = not entry["tokens"]
    return entry


def _model_order(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else -1 for part in name.split(".")]


def _place(entry: Mapping[str, Any]) -> tuple[int, str]:
    """Layer, and the name that an expert's linear has in every expert."""
    return entry["layer"], entry["module"].rpartition(".")[2]


def _mixtures(experts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A summary of each linear of a layer's experts, from their entries in model order."""
    groups: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for entry in experts:
        groups.setdefault(_place(entry), []).append(entry)
    found = []
    for (layer, module), entries in groups.items():
        reached = [entry for entry in entries if not entry["is_idle"]]
        order = sorted(reached, key=lambda entry: _or_infinity(entry["output_sqnr_db"]))
        middle, worst = order[len(order) // 2 : len(order) // 2 + 1], order[:1]
        figures = {"worst": worst, "median": middle}
        found.append({
            "layer": layer,
            "module": module,
            "experts": len(entries),
            "idle": [n for n, entry in enumerate(entries) if entry["is_idle"]],
            "output_sqnr_db": {
                key: next((e["output_sqnr_db"] for e in one), None) for key, one in figures.items()
            },
            "worst": next((e["name"] for e in worst), None),
        })  # fmt: skip
    return found


def _or_infinity(decibel: float | None) -> float:
    return math.inf if decibel is None else decibel  # None: exact


def _checked(found: Mapping[str, Any]) -> dict[str, Any]:
    """Raises ValueError if there is nothing to report about, or NaN or infinite values."""
    if not found:
        raise UserError("quality report: nothing of this model is quantized.")
    ordered = [found[name] for name in sorted(found, key=_model_order)]
    mixtures = _mixtures([entry for entry in ordered if "is_idle" in entry])
    whole = {(m["layer"], m["module"]): m for m in mixtures}
    for name, entry in found.items():
        mixture = whole.get(_place(entry)) if "is_idle" in entry else None
        if not entry["tokens"] and (mixture is None or mixture["worst"] is None):
            raise UserError(
                f"quality report: no token reached {name}; the text has too few tokens."
            )
        if not entry["is_finite"]:
            raise UserError(
                f"quality report: weight, input or output of {name} is NaN or infinite; look at the "
                "checkpoint, or restore an earlier one."
            )
    for entry in ordered:
        del entry["tokens"], entry["is_finite"]  # tokens count several times where ranks share them
    linears = [entry for entry in ordered if "outliers" in entry]
    return {
        "version": VERSION,
        "linears": linears,
        "mixtures": mixtures,
        "caches": [entry for entry in ordered if "outliers" not in entry],
    }

"""How well each linear survives its quantization: signal to noise, clipping, outlier channels.

Every linear is run twice on the input it meets in the quantized model, with its quantizers and without:

    SQNR = 10 log10(sum y² / sum (y - y_q)²)  dB        of the weight, and of the output over all tokens

A bit is worth 6 dB. Sums and maxima are merged over ranks in one collective each, so that the report is
the same on every layout, up to the order in which floats are added.

| key in the JSON             | meaning                                                               |
|-----------------------------|-----------------------------------------------------------------------|
| `version`                   | of this format: 1                                                     |
| `linears[].output_sqnr_db`  | null: exact                                                           |
| `linears[].weight`, `input` | null if not quantized; else `format`, `amax`, `clip_rate`, `scale`    |
| `linears[].weight.sqnr_db`  | null: exact                                                           |
| `linears[].outliers`        | channels whose amax is above `OUTLIER_RATIO` x the median channel's   |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mqat.parallel.linear import QuantizedLinear, QuantRowParallelLinear, quantized_linears
from mqat.parallel.reduce import all_reduce_fused_
from mqat.quant.granularity import grouped_view
from mqat.quant.quantizer import Quantizer

VERSION = 1
OUTLIER_RATIO = 10.0
_WORST = 5  # outlier channels that are named
# Places in `sums`.
_SIGNAL, _NOISE, _CLIPPED, _COUNT, _TOKENS = range(5)


@contextmanager
def _unquantized(linear: QuantizedLinear) -> Iterator[None]:
    quantizers = linear.quantizers.values()
    enabled = [quantizer.is_enabled for quantizer in quantizers]
    try:
        for quantizer in quantizers:
            quantizer.is_enabled = False
        yield
    finally:
        for quantizer, was in zip(quantizers, enabled, strict=True):
            quantizer.is_enabled = was


def clipped(x: Tensor, quantizer: Quantizer) -> Tensor:
    """Number of elements beyond the last code (integers: by more than half a step), int64 ()."""
    if quantizer.scheme.is_dynamic:
        return torch.zeros((), dtype=torch.int64, device=x.device)
    scale, zero_point = quantizer.steps(x)
    fmt, granularity = quantizer.scheme.format, quantizer.scheme.granularity
    groups, steps = grouped_view(x.detach().float(), scale, granularity)
    codes = groups / steps
    if zero_point is not None:
        codes = codes + grouped_view(x, zero_point, granularity)[1]
    slack = 0.0 if fmt.is_float else 0.5
    return ((codes < fmt.qmin - slack) | (codes > fmt.qmax + slack)).sum()


def _decibel(signal: float, noise: float) -> float | None:
    return 10 * math.log10(signal / noise) if noise > 0 and signal > 0 else None


@dataclass
class _Watched:
    """What one linear's calls left on this rank.

    Attributes:
        linear: Watched.
        sums: float64 (5,): squares of outputs, squares of their errors, clipped inputs, inputs, tokens.
        amax: Largest |x_j| of each global input channel, float32 [I]; zero where others hold it.
    """

    linear: QuantizedLinear
    sums: Tensor
    amax: Tensor
    is_inside: bool = False

    def hook(self, _: Any, args: tuple[Tensor, ...], output: tuple[Tensor, Tensor | None]) -> None:
        """After a forward: runs the linear again without its quantizers."""
        if self.is_inside:
            return
        self.is_inside = True
        x, linear = args[0].detach(), self.linear
        with torch.no_grad(), _unquantized(linear):
            exact = linear(x)[0].double()
        self.is_inside = False
        self.sums[_SIGNAL] += exact.square().sum()
        self.sums[_NOISE] += (output[0].detach().double() - exact).square().sum()
        if linear.input_quantizer is not None:
            self.sums[_CLIPPED] += clipped(x, linear.input_quantizer)
        self.sums[_COUNT] += x.numel()
        self.sums[_TOKENS] += x.shape[0] * x.shape[1]
        own = x.abs().flatten(0, -2).amax(dim=0).float()
        cut = isinstance(linear, QuantRowParallelLinear)
        start = own.numel() * linear.tp_group.rank() if cut else 0
        place = self.amax[start : start + own.numel()]
        torch.maximum(place, own, out=place)


def _weight_sums(linear: QuantizedLinear) -> Tensor:
    """float64 (4,): squares, squared errors, clipped elements, elements, of this rank's part."""
    quantizer, weight = linear.weight_quantizer, linear.weight.detach()
    sums = torch.zeros(4, dtype=torch.float64, device=weight.device)
    if quantizer is None:
        return sums
    sums[_SIGNAL] = weight.double().square().sum()
    sums[_NOISE] = (quantizer(weight).double() - weight.double()).square().sum()
    sums[_CLIPPED], sums[_COUNT] = clipped(weight, quantizer), weight.numel()
    return sums


def _scale_range(quantizer: Quantizer) -> Tensor:
    """-smallest and largest frozen scale, float32 (2,): both merge by MAX."""
    scale = quantizer.frozen_tensors.get("scale", quantizer.frozen_tensors.get("global_scale"))
    if scale is None or not scale.numel():
        return torch.full((2,), -math.inf, device=quantizer.scale.device)
    return torch.stack([-scale.min(), scale.max()])


def _operand(quantizer: Quantizer | None, amax: float, rate: float, ends: Tensor) -> Any:
    if quantizer is None:
        return None
    scheme = quantizer.scheme
    low, high = -float(ends[0]), float(ends[1])
    return {
        "format": f"{scheme.format.name} per {scheme.granularity}",
        "amax": amax,
        "clip_rate": rate,
        "scale": [low, high] if math.isfinite(high) else None,
    }


def _outliers(amax: Tensor) -> dict[str, Any]:
    ratios = amax / amax.median().clamp_min(1e-20)
    order = torch.argsort(ratios, descending=True, stable=True)[:_WORST]
    worst = [[int(i), round(float(ratios[i]), 2)] for i in order if ratios[i] > OUTLIER_RATIO]
    return {"count": int((ratios > OUTLIER_RATIO).sum()), "worst": worst}


def quality_report(
    chunks: list[Any], run_batches: Callable[[], None], *, group: dist.ProcessGroup
) -> dict[str, Any]:
    """Runs the batches through a calibrated model and measures every quantized linear.

    Args:
        chunks: Model chunks of this rank.
        run_batches: Forward passes (all ranks); a rank without batches just returns.
        group: TP x DP x CP of this pipeline stage.

    Returns:
        The table at the top of this module as plain data, linears in model order, on every rank.

    Raises:
        ValueError: Nothing is quantized, no token reached a linear, or one is not finite; on every rank.
    """
    linears = {n: x for n, x in quantized_linears(chunks).items() if x.quantizers}
    watched: dict[str, _Watched] = {}
    for name, linear in linears.items():
        cut = linear.tp_group.size() if isinstance(linear, QuantRowParallelLinear) else 1
        device, width = linear.weight.device, linear.weight.shape[1] * cut
        sums = torch.zeros(5, dtype=torch.float64, device=device)
        watched[name] = _Watched(linear, sums, torch.zeros(width, device=device))
    handles = [w.linear.register_forward_hook(w.hook) for w in watched.values()]
    try:
        run_batches()
    finally:
        for handle in handles:
            handle.remove()
    weights = {name: _weight_sums(linear) for name, linear in linears.items()}
    ends = {
        name: {kind: _scale_range(q) for kind, q in linear.quantizers.items()}
        for name, linear in linears.items()
    }
    largest = {n: x.weight.detach().abs().amax().float().reshape(1) for n, x in linears.items()}
    totals = [*(w.sums for w in watched.values()), *weights.values()]
    maxima = [w.amax for w in watched.values()] + list(largest.values())
    maxima += [pair for kinds in ends.values() for pair in kinds.values()]
    all_reduce_fused_(totals, dist.ReduceOp.SUM, group)
    all_reduce_fused_(maxima, dist.ReduceOp.MAX, group)
    own = {
        name: _entry(name, w, weights[name], float(largest[name]), ends[name])
        for name, w in watched.items()
    }
    stages: list[dict[str, Any] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(stages, own)
    found: dict[str, Any] = {}
    for stage in stages:
        found |= stage or {}
    return _checked(found)


def _entry(
    name: str, watched: _Watched, weight: Tensor, weight_amax: float, ends: Mapping[str, Tensor]
) -> dict[str, Any]:
    signal, noise, over, count, tokens = watched.sums.tolist()
    linear, none = watched.linear, torch.zeros(2)
    w_signal, w_noise, w_over, w_count = weight.tolist()
    rate = over / count if count else 0.0
    on_weight = _operand(
        linear.weight_quantizer, weight_amax, w_over / max(w_count, 1.0), ends.get("weight", none)
    )
    if on_weight is not None:
        on_weight["sqnr_db"] = _decibel(w_signal, w_noise)
    amax = float(watched.amax.max())
    return {
        "name": name,
        "tokens": tokens,
        "is_finite": math.isfinite(signal + noise + w_signal + w_noise),
        "output_sqnr_db": _decibel(signal, noise),
        "weight": on_weight,
        "input": _operand(linear.input_quantizer, amax, rate, ends.get("input", none)),
        "input_amax": amax,
        "outliers": _outliers(watched.amax),
    }


def _model_order(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else -1 for part in name.split(".")]


def _checked(found: Mapping[str, Any]) -> dict[str, Any]:
    """Raises ValueError if there is nothing to report about, or NaN or infinite values."""
    if not found:
        raise ValueError("quality report: no linear of this model is quantized.")
    for name, entry in found.items():
        if not entry["tokens"]:
            raise ValueError(
                f"quality report: no token reached {name}; the text has too few tokens."
            )
        if not entry["is_finite"]:
            raise ValueError(
                f"quality report: weight, input or output of {name} is NaN or infinite; look at the "
                "checkpoint, or restore an earlier one."
            )
    linears = [found[name] for name in sorted(found, key=_model_order)]
    for entry in linears:
        del entry["tokens"], entry["is_finite"]  # tokens count several times where ranks share them
    return {"version": VERSION, "linears": linears}

"""Calibration: watch unquantized activations, merge over ranks once, freeze every scale.

The forward passes are layout-exact (`parallel/exact.py`) and every statistic merges exactly, so the
same sequences give bit-equal scales at any TP, PP, DP, with and without sequence parallelism, and at
any EP, and at
any CP if ranks compute with whole sequences (`evaluation.forward.run_layers`); with their own chunks
alone, attention and GEMMs of other shapes round differently.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mqat.calibration.idle_experts import idle_experts, substituted
from mqat.errors import UserError
from mqat.parallel.linear import quantized_linears, tp_axis
from mqat.parallel.parameter_sync import gather_parameters
from mqat.parallel.quantized_module import (
    QuantizedModule,
    quantized_modules,
    sharing_statistics,
)
from mqat.parallel.reduce import all_reduce_fused_
from mqat.quant.qparams import statistic_of
from mqat.runtime.groups import any_rank, gathered, on_all_ranks


@contextmanager
def exact_forward(modules: Mapping[str, QuantizedModule]) -> Iterator[None]:
    """Layout-exact, unquantized GEMMs inside the context, under `torch.no_grad()`."""
    for module in modules.values():
        module.begin_calibration()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in modules.values():
            module.end_calibration()


def calibrate(
    model: Any,
    run_batches: Callable[[], None],
    *,
    group: dist.ProcessGroup,
    method: str = "max",
    percentile: float = 99.9999,
    input_headroom: float = 1.0,
    weight_qparams: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> list[str]:
    """Freezes every quantizer of `model` at the scale found for it.

    Args:
        model: Chunk or list of chunks of this rank, with quantized modules.
        run_batches: Runs the forward passes of the calibration set (forward only, all ranks).
        group: All ranks that hold parts of the same layers: TP x DP x CP of one pipeline stage. (Experts
            know the ranks that hold parts and copies of them.)
        method: For inputs and caches: `max`, `percentile`, `mse` or `entropy`.
        percentile: In (0, 100].
        input_headroom: How far above what was found an input may lie before its block saturates, where
            an upper scale of two levels is all that is frozen (NVFP4); at least 1.
        weight_qparams: What weights are frozen with as it is, from `apply_weight_recipe_`, by linear;
            the scales of others are those of their maxima.

    Returns:
        Global names of experts' linears that no or hardly any token reached (`idle_experts.py`), on
        every rank: their inputs have the largest scale among the other experts of their layer.

    Raises:
        UserError: On every rank: NaN or infinite values, or a module that no token reached, where that
            is not one of several experts; names it.
    """
    gather_parameters(model)
    modules, linears = quantized_modules(model), quantized_linears(model)
    activations = {
        quantizer.name: quantizer
        for module in modules.values()
        for kind, quantizer in module.quantizers.items()
        if kind != "weight"
    }
    for quantizer in activations.values():
        quantizer.start_observing(method)
    overflow: dict[str, Tensor] = {}
    if any_rank(bool(activations)):  # weights alone need no text
        with exact_forward(modules):
            run_batches()
            overflow = {
                name: linear.overflow.float()
                for name, linear in linears.items()
                if linear.overflow is not None
            }
    chosen = weight_qparams or {}
    amax = {
        name: statistic_of(module.weight, module.quantizers["weight"].scheme)
        for name, module in modules.items()
        if "weight" in module.quantizers and name not in chosen
    }
    whole = {name: local.amax().reshape(1) for name, local in amax.items()}  # of two-level scales
    observers = {name: q.observer for name, q in activations.items() if q.observer is not None}
    for names, groups in sharing_statistics(modules, group):
        own = {f"{name}." for name in names}
        seen = [o for name, o in observers.items() if f"{name.rpartition('.')[0]}." in own]
        maxima = [
            *(
                amax[n]
                for n in names
                if n in amax and tp_axis(modules[n], "weight", "scale") is None
            ),
            *(whole[name] for name in names if name in whole),
            *(overflow[name] for name in names if name in overflow),
            *(observer.statistics for observer in seen),
        ]
        for shared in groups:
            all_reduce_fused_(maxima, dist.ReduceOp.MAX, shared)
            if method != "max":
                histograms = [observer.histogram for observer in seen]
                all_reduce_fused_(histograms, dist.ReduceOp.SUM, shared)

    idle = idle_experts(modules)
    with on_all_ranks():
        for name, observer in observers.items():
            if name.rpartition(".")[0] not in idle or bool(observer.statistics[2]):
                observer.check(name)
        _check_finite(modules, overflow, amax | {n: q["scale"] for n, q in chosen.items()})
    for name in amax:
        modules[name].quantizers["weight"].freeze_(amax[name], whole[name])
    for name, qparams in chosen.items():
        modules[name].quantizers["weight"].load_(qparams)
    found = {
        name: observers[name].calibrated(quantizer.scheme, percentile)
        for name, quantizer in activations.items()
        if name.rpartition(".")[0] not in idle
    }
    found |= substituted(modules, idle, found)
    for name, quantizer in activations.items():
        room = input_headroom if quantizer.scheme.has_global_scale else 1.0
        quantizer.freeze_(found[name] * room)
    return sorted({name for names in gathered(sorted(idle)) for name in names})


def _check_finite(
    names: Iterable[str], overflow: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> None:
    """Raises UserError for the first module whose output or weight (by its maxima) is not finite."""
    for name in names:
        if name in overflow and overflow[name].item():
            raise UserError(
                f"{name}: output is NaN or infinite during calibration. Check the "
                "weights of this layer and the calibration text; the model may have diverged."
            )
        if name in weights and not bool(weights[name].isfinite().all()):
            raise UserError(
                f"{name}: weight holds NaN or infinite values; restore another checkpoint."
            )

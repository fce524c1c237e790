"""Which scales are trained, and what Megatron must know about each: factor, sum over TP, ownership.

A rank's backward pass gives the scale's gradient from the elements that the rank quantizes itself. The
input gradient of a column-parallel linear is summed over TP before it reaches the input quantizer
(all-reduce, or reduce-scatter under sequence parallelism), that of a row-parallel linear is whole
from the start. So the gradient of a scale is

| scale of                          | on a rank                      | the whole                 |
|-----------------------------------|--------------------------------|---------------------------|
| column-parallel input             | every element                  | that                      |
| the same, sequence parallelism    | its own tokens                 | sum over TP               |
| row-parallel input                | its own features               | sum over TP               |
| column-parallel weight, tensor    | its own rows                   | sum over TP               |
| row-parallel weight, tensor or channel | its own columns           | sum over TP               |
| other weights                     | every element of its scales    | that; scales are cut, too |
| input of an expert                | its own rows or features       | sum over expert TP        |

Sums over DP are those of every parameter (DDP's buffers). For sums over TP, Megatron's
`finalize_model_grads` averages what is marked `average_gradients_across_tp_domain`, whatever the
layout; a factor of the group's size makes the average a sum. (`sequence_parallel` marks only work
with sequence parallelism.)
"""

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import (
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)

from mqat.parallel.linear import QuantizedLinear, decoder_linears, tp_axis
from mqat.quant.learned import Rule, lsq_grad_scale


def scale_spans_ranks(linear: QuantizedLinear, kind: str) -> bool:
    """Whether elements that share a scale lie on several tensor-parallel ranks (table above)."""
    if kind == "weight":
        return tp_axis(linear, kind, "scale") is None
    if linear.expert_groups is not None:  # their dispatcher sums the gradient, before the linear
        return True
    return isinstance(linear, RowParallelLinear) or bool(linear.config.sequence_parallel)


def elements_per_scale(linear: QuantizedLinear, kind: str) -> float:
    """LSQ's N over all ranks: weight elements that share a scale, or the features of a token."""
    if kind == "input":
        return linear.input_size
    own = linear.weight.numel() / linear.quantizers[kind].scale.numel()
    return own * (linear.tp_group.size() if scale_spans_ranks(linear, kind) else 1)


def learn_scales_(model: Any, *, weights: Rule | None = None, inputs: Rule | None = None) -> None:
    """Makes scales of the layers parameters, which calibration initializes and the optimizer trains.

    Call it after the model is built and before DDP wraps it. The parameters carry `scale_rule` and
    `clip_codes` (codes from zero to the clipping point), by which `build_optimizer` groups them.

    Args:
        model: Chunk or list of chunks of this rank, with quantized linears.
        weights: `lsq`, or None: frozen.
        inputs: `lsq`, `pact`, or None: frozen.

    Raises:
        UserError: A scheme whose scales cannot be trained; names the operand.
    """
    rules = {"weight": weights, "input": inputs}
    for linear in decoder_linears(model).values():
        for kind, quantizer in linear.quantizers.items():
            rule = rules.get(kind)
            if rule is None:
                continue
            fmt, tp = quantizer.scheme.format, linear.tp_group.size()
            factor = lsq_grad_scale(elements_per_scale(linear, kind), fmt) if rule == "lsq" else 1.0
            spans = scale_spans_ranks(linear, kind) and tp > 1
            scale: Any = quantizer.learn_(rule, factor * (tp if spans else 1))
            scale.average_gradients_across_tp_domain = spans
            scale.allreduce = getattr(
                linear.weight, "allreduce", True
            )  # of an expert: with its copies
            axis = tp_axis(linear, kind, "scale")
            # Counted once in the gradient norm: from every rank if cut, else from the first.
            set_tensor_model_parallel_attributes(scale, axis is not None and tp > 1, axis or 0, 1)
            scale.scale_rule, scale.clip_codes = rule, fmt.max_value


def scale_rule(parameter: torch.nn.Parameter) -> Rule | None:
    """How a learned scale is trained; None for any other parameter."""
    rule: Rule | None = getattr(parameter, "scale_rule", None)
    return rule

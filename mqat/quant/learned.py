"""Fake quantization whose scale is trained: LSQ for symmetric grids, PACT's clip value through it.

LSQ (Esser et al. 2020, arXiv:1902.08153, eqs. 1-3) gives the step s the straight-through gradient

    d x_hat / d s =  round(x/s) - x/s    where x was not clipped
                     qmin or qmax        where it was

times `grad_scale = 1 / sqrt(N * qmax)`, N being the elements that share the scale, over all ranks. PACT
(Choi et al. 2018, arXiv:1805.06085) trains the clip value alpha = s * qmax and counts clipped elements
only: `d x_hat / d alpha` is 1 above, -1 below for signed inputs, else 0. As with frozen scales, a value
up to half a step beyond the last code still rounds to it and is not clipped.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from mqat.quant.formats import QuantFormat
from mqat.quant.granularity import Granularity, grouped_view

Rule = Literal["lsq", "pact"]


def lsq_grad_scale(num_elements: int, fmt: QuantFormat) -> float:
    """LSQ's factor on the scale's gradient.

    Args:
        num_elements: Elements that share one scale, over all ranks that hold some of them; for
            activations the features of one token, as in the paper's section 2.2.
        fmt: Only `max_value` is used.
    """
    return 1.0 / math.sqrt(num_elements * fmt.max_value)


def _sum_by_scale(x_grad: Tensor, scale: Tensor, granularity: Granularity) -> Tensor:
    """Adds up what belongs to each scale: the transpose of expanding scales over `x_grad`."""
    with torch.enable_grad():
        leaf = scale.detach().requires_grad_()
        grad, steps = grouped_view(x_grad, leaf, granularity)
        (total,) = torch.autograd.grad(steps, leaf, grad.sum_to_size(steps.shape))
    return total


class _LearnedFakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        fmt: QuantFormat,
        granularity: Granularity,
        grad_scale: float,
        rule: Rule,
    ) -> Tensor:
        groups, steps = grouped_view(x.float(), scale, granularity)
        codes = (groups / steps).round_().clamp_(fmt.qmin, fmt.qmax)
        ctx.save_for_backward(x, scale)
        ctx.how = (fmt, granularity, grad_scale, rule)
        return codes.mul_(steps).add_(0.0).view(x.shape).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        x, scale = ctx.saved_tensors
        fmt, granularity, grad_scale, rule = ctx.how
        groups, steps = grouped_view(x.float(), scale, granularity)
        ratio = groups / steps
        above, below = ratio > fmt.qmax + 0.5, ratio < fmt.qmin - 0.5
        inside = ~(above | below)
        upstream = grad.float().view(ratio.shape)
        if rule == "lsq":
            codes = ratio.round().clamp_(fmt.qmin, fmt.qmax)
            slope = torch.where(inside, codes - ratio, codes)
        else:
            slope = (above.float() - below.float()) * fmt.max_value
        scale_grad = _sum_by_scale((upstream * slope).view(x.shape), scale, granularity)
        x_grad = (upstream * inside).view(x.shape).to(grad.dtype)
        return x_grad, scale_grad * grad_scale, None, None, None, None


def fake_quantize_learned(
    x: Tensor,
    scale: Tensor,
    fmt: QuantFormat,
    granularity: Granularity,
    *,
    grad_scale: float = 1.0,
    rule: Rule = "lsq",
) -> Tensor:
    """`dequantize(quantize(x))`, with gradients for `x` and for `scale`.

    Args:
        x: Tensor of any float dtype.
        scale: float32 step, shape `granularity.scale_shape(x.shape)`; must be positive.
        fmt: Integer format.
        granularity: Which elements share a scale.
        grad_scale: Factor on the scale's gradient (`lsq_grad_scale`).
        rule: `lsq`, or `pact`: only clipped elements move the scale.

    Returns:
        Like `x`. The gradient of `scale` counts this rank's elements only; a scale that spans ranks
        needs their sum.

    Raises:
        ValueError: A floating-point format: its step is not uniform, so neither formula applies.
    """
    if fmt.is_float:
        raise ValueError(
            f"learned scales need an integer format, not {fmt.name!r}; keep its scales frozen."
        )
    result: Tensor = _LearnedFakeQuantize.apply(  # type: ignore[no-untyped-call]
        x, scale, fmt, granularity, grad_scale, rule
    )
    return result

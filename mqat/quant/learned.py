"""Fake quantization whose scale is trained: LSQ for symmetric grids, PACT's clip value through it.

LSQ (Esser et al. 2020, arXiv:1902.08153, eqs. 1-3) gives the step s the straight-through gradient

    d x_hat / d s =  round(x/s) - x/s    where x was not clipped
                     qmin or qmax        where it was

(values replace codes where the grid is stretched) times `grad_scale = 1 / sqrt(N * max_value)`, N being
the elements that share the scale, over all ranks, and `max_value` the format's: codes from zero to the
clipping point. PACT (Choi et al. 2018, arXiv:1805.06085) trains the clip value alpha = s * max_value and
counts clipped elements only: `d x_hat / d alpha` is 1 above, -1 below for signed inputs, else 0. As with
frozen scales, a value up to half a step beyond the last code still rounds to it and is not clipped.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from mqat.errors import UserError
from mqat.quant.formats import QuantFormat
from mqat.quant.functional import quantize_dequantize_, round_values_
from mqat.quant.granularity import Granularity, grouped_view
from mqat.quant.scales import round_up
from mqat.quant.scheme import TensorScheme

Rule = Literal["lsq", "pact"]


def lsq_grad_scale(num_elements: float, fmt: QuantFormat) -> float:
    """LSQ's factor on the scale's gradient.

    `num_elements` are those that share one scale, over all ranks that hold some of them; for
    activations the features of one token, as in the paper's section 2.2.
    """
    return 1.0 / math.sqrt(num_elements * fmt.max_value)


def check_learnable(scheme: TensorScheme, name: str) -> None:
    """Refuses operands whose scale cannot be trained.

    Raises:
        UserError: Names the operand, what its scheme has, and what would work.
    """
    reasons = {
        "dynamic scales, which follow every tensor": scheme.is_dynamic,
        f"format {scheme.format.name!r}, whose steps differ in size": not scheme.format.is_uniform,
        "a zero point": scheme.is_asymmetric,
        f"scales on the grid {scheme.scale_name!r}": scheme.scale_dtype
        not in (torch.float32, torch.bfloat16),
    }
    for reason, holds in reasons.items():
        if holds:
            raise UserError(
                f"{name}: a learned scale needs a static, symmetric uniform format with float32 or "
                f"bfloat16 scales; this operand has {reason}. Leave its scales frozen, or change "
                "its scheme by a rule."
            )


class _ServedScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scale: Tensor, scale_dtype: torch.dtype) -> Tensor:
        return round_up(scale.detach(), scale_dtype).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def served_scale(scale: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """A trained scale as it is used and served: positive, on its grid; straight-through gradient.

    A parameter that the optimizer has driven below the smallest step counts as that step and still
    gets its gradient, so that it comes back.
    """
    result: Tensor = _ServedScale.apply(scale, scale_dtype)  # type: ignore[no-untyped-call]
    return result


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
        ctx.save_for_backward(x, scale)
        ctx.how = (fmt, granularity, grad_scale, rule)
        values = quantize_dequantize_(groups / steps, steps, fmt, fmt.qmin, fmt.qmax)
        return values.view(x.shape).to(x.dtype)

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
            values = round_values_(ratio.clone(), fmt, fmt.qmin, fmt.qmax)
            slope = torch.where(inside, values - ratio, values)
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

    `scale` is float32, positive, shape `granularity.scale_shape(x.shape)`; its gradient, `grad_scale`
    times the `rule`'s, counts this rank's elements only: a scale that spans ranks needs their sum.
    """
    assert fmt.is_uniform, f"{fmt.name} has no one step, so neither formula applies"
    result: Tensor = _LearnedFakeQuantize.apply(  # type: ignore[no-untyped-call]
        x, scale, fmt, granularity, grad_scale, rule
    )
    return result

"""Distillation losses over a vocabulary that is cut over tensor-parallel ranks.

Distributions are compared in chunks of tokens, so that no second matrix of `[tokens, vocabulary]` exists
in float32, and the teacher's logits exist for one chunk at a time only. Two small collectives a chunk:
maxima, then sums; two more choose the likeliest k tokens.

Source of the losses: Hinton et al., "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531),
with its factor T^2, by which gradients keep their size at any temperature T; reverse KL: Gu et al.,
"MiniLLM" (arXiv 2306.08543); the mix with cross entropy: NVIDIA's QAD report (arXiv 2601.20088).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mqat.errors import UserError
from mqat.parallel.cross_entropy import (
    OUTSIDE,
    chunks,
    entropy_parts,
    entropy_slope_,
    is_padding,
)
from mqat.parallel.reduce import all_reduce_fused_

DIVERGENCES = ("forward_kl", "reverse_kl")

# Rows [start, stop) of the teacher's logits, of this rank's columns: [stop - start, V/tp].
TeacherRows = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class DistillationLoss:
    """What is minimized, for every token that counts.

    Attributes:
        divergence: `forward_kl`, KL(teacher || student), or `reverse_kl`, KL(student || teacher).
        weight: Share of the divergence; the rest is cross entropy with the labels.
        temperature: Both models' logits are divided by it in the divergence, which is multiplied by its
            square.
        top_k: Both distributions are cut to the teacher's k likeliest tokens and normalized again; None:
            all tokens. Of equally likely tokens at the border, those with the lowest numbers.
    """

    divergence: str = "forward_kl"
    weight: float = 1.0
    temperature: float = 1.0
    top_k: int | None = None

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise UserError(
                f"divergence={self.divergence!r} is not one of: {', '.join(DIVERGENCES)}."
            )


def distillation_losses(
    student: Tensor,
    teacher: TeacherRows,
    labels: Tensor,
    loss: DistillationLoss,
    *,
    vocab_size: int,
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of every token, and its two parts.

    Args:
        student: Logits [n, Vp/tp] of this tensor-parallel rank's columns, of any float dtype.
        teacher: The teacher's logits of the same tokens and columns.
        labels: Next tokens [n].
        loss: What is minimized.
        vocab_size: Without padding: columns from here on take no probability.
        group: Tensor-parallel ranks.

    Returns:
        float32 [n] each: the loss, through which gradients flow; the divergence (with T^2) and the cross
        entropy, for reports (cross entropy 0 where it has no share).
    """
    result: tuple[Tensor, Tensor, Tensor] = _Distillation.apply(
        student, teacher, labels, loss, vocab_size, group
    )
    return result


class _Distillation(torch.autograd.Function):
    """Keeps the gradient [n, Vp/tp] in the student's dtype, in the place of its logits."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: TeacherRows,
        labels: Tensor,
        loss: DistillationLoss,
        vocab_size: int,
        group: dist.ProcessGroup,
    ) -> tuple[Tensor, Tensor, Tensor]:
        count, columns = student.shape
        first = group.rank() * columns
        padding = is_padding(columns, vocab_size, group, student)
        divergence, entropy = student.new_zeros(2, count, dtype=torch.float32)
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        for start, stop in chunks(count, columns):
            s, t = student[start:stop].float(), teacher(start, stop).float()
            if first + columns > vocab_size:
                s, t = (x.masked_fill(padding, OUTSIDE) for x in (s, t))
            own = labels[start:stop] - first
            divergence[start:stop], entropy[start:stop], slope = _chunk(
                s, t, own, loss, group, with_gradient=gradient is not None
            )
            if gradient is not None:
                assert slope is not None, "asked for above"
                gradient[start:stop] = slope
        ctx.save_for_backward(gradient)
        total = loss.weight * divergence + (1 - loss.weight) * entropy
        ctx.mark_non_differentiable(divergence, entropy)
        return total, divergence, entropy

    @staticmethod
    def backward(
        ctx: Any, upstream: Tensor, *_: Any
    ) -> tuple[Tensor, None, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.unsqueeze(1).to(gradient.dtype), None, None, None, None, None


def _chunk(
    s: Tensor,
    t: Tensor,
    labels: Tensor,
    loss: DistillationLoss,
    group: dist.ProcessGroup,
    *,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Divergence and cross entropy of rows, and the slope of their mix in the student's logits."""
    temperature = loss.temperature
    u, v = s / temperature, t / temperature
    if loss.top_k is not None:
        outside = ~_largest(v, loss.top_k, group)
        u, v = u.masked_fill(outside, OUTSIDE), v.masked_fill(outside, OUTSIDE)
    maxima = torch.stack([x.amax(1) for x in (u, v, s)])
    all_reduce_fused_([maxima], dist.ReduceOp.MAX, group)
    top_u, top_v, top_s = maxima
    exp_u, exp_v = (u - top_u[:, None]).exp_(), (v - top_v[:, None]).exp_()
    apart = torch.where(u == OUTSIDE, 0.0, v - u)  # log-probabilities, but for their constants
    is_forward = loss.divergence == "forward_kl"
    weighted = exp_v if is_forward else exp_u
    parts = [exp_u.sum(1), exp_v.sum(1), (weighted * apart).sum(1)]
    if loss.weight < 1:
        exp_s, *more = entropy_parts(s, top_s, labels)
        parts += more
    sums = torch.stack(parts)
    all_reduce_fused_([sums], dist.ReduceOp.SUM, group)
    sum_u, sum_v, sum_apart = sums[:3]
    log_u, log_v = sum_u.log() + top_u, sum_v.log() + top_v
    p_u, p_v = exp_u.div_(sum_u[:, None]), exp_v.div_(sum_v[:, None])
    if is_forward:
        divergence = sum_apart / sum_v - log_v + log_u
        slope = p_u - p_v if with_gradient else None
    else:
        divergence = -(sum_apart / sum_u) - log_u + log_v
        apart = (log_v - log_u - divergence)[:, None] - apart
        slope = p_u * apart if with_gradient else None
    entropy = torch.zeros_like(divergence)
    if slope is not None:
        slope *= loss.weight * temperature  # T^2 of the loss, 1/T of its logits
    if loss.weight < 1:
        entropy = sums[3].log() + top_s - sums[4]
        if slope is not None:
            slope += entropy_slope_(exp_s, sums[3], labels, 1 - loss.weight)
    return divergence * temperature**2, entropy, slope


def _largest(x: Tensor, k: int, group: dist.ProcessGroup) -> Tensor:
    """Which elements [n, V/tp] are of the k largest of a row over all ranks: exactly k.

    Of equal ones at the border those with the lowest column, whatever the number of ranks.
    """
    ranks, own = group.size(), min(k, x.shape[1])
    best = x.topk(own, dim=1).values
    everywhere = x.new_empty(ranks, *best.shape)
    dist.all_gather(list(everywhere), best.contiguous(), group=group)
    candidates = everywhere.transpose(0, 1).flatten(1)
    border = candidates.topk(k, dim=1).values[:, -1:]
    above, equal = x > border, x == border
    counts = torch.stack([above.sum(1), equal.sum(1)])
    all_counts = counts.new_empty(ranks, *counts.shape)
    dist.all_gather(list(all_counts), counts, group=group)
    room = k - all_counts[:, 0].sum(0) - all_counts[: group.rank(), 1].sum(0)
    return above | (equal & (equal.cumsum(1) <= room[:, None]))

"""The input Hessian of a linear, XᵀX, bit-equal on every layout, from one pass.

With D the error of a quantized weight, the squared error of the layer's output over all calibration
tokens is exactly tr(D XᵀX Dᵀ). So this one matrix replaces the repeated forward passes with
re-quantized weights that AWQ (arXiv:2306.00978) and GPTQ (arXiv:2210.17323) searches otherwise need.

Why it does not depend on the layout: the input channels are cut into `num_shards` shards, whatever the
tensor-parallel size; one shard of XᵀX over one microbatch is a GEMM of the same shape everywhere; and
microbatches are added as 64-bit integers in units of 2**-FRACTION_BITS, in any order.

| input X seen by a rank                    | made whole by       | rows of XᵀX it keeps | merged over |
|-------------------------------------------|---------------------|----------------------|-------------|
| column-parallel `[S, B, I]`               | -                   | I / tp               | DP          |
| the same, sequence parallel `[S/tp, B, I]`| gather of sequence  | I / tp               | DP          |
| row-parallel `[S, B, I/tp]`               | gather of channels  | I / tp               | DP          |

An expert's linear sees the tokens that are sent to it, of all ranks that share experts (`experts.py`),
so that ranks with copies of it take the place of DP.

Memory per rank: 8 I² / tp bytes for each watched linear whose recipe looks at more than maxima; a search
adds a few float64 matrices [I, I] for one linear at a time.
"""

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from torch import Tensor

from mqat.errors import UserError
from mqat.parallel.linear import QuantizedLinear, QuantRowParallelLinear
from mqat.parallel.reduce import all_reduce_fused_
from mqat.transfer import to_device

# Resolution 2**-20 of one squared unit; sums of squares over all tokens must stay below 2**42.
FRACTION_BITS = 20
MAX_SUM = 2.0**42


def shard_bounds(size: int, shards: int) -> list[int]:
    """Ends of `shards` parts of `size` elements, as even as possible, with a leading zero."""
    return [i * size // shards for i in range(shards + 1)]


def num_shards(linear: QuantizedLinear) -> int:
    """Number of shards over all ranks: the same on every layout."""
    return int(linear.shards_per_rank * linear.tp_group.size())


def whole_input(linear: QuantizedLinear, x: Tensor) -> Tensor:
    """All tokens of the microbatch with all channels, float32 [S * B, I], on every tensor rank."""
    if isinstance(linear, QuantRowParallelLinear):
        x = gather_from_tensor_model_parallel_region(x, group=linear.tp_group)
    elif linear.sequence_parallel and linear.expert_groups is None:  # experts have whole tokens
        x = gather_from_sequence_parallel_region(x, group=linear.tp_group)
    return x.detach().reshape(-1, x.shape[-1]).float().contiguous()


@dataclass
class InputHessian:
    """What one linear's input left on this rank.

    Attributes:
        hessian: Fixed-point rows of XᵀX of this rank's channels, int64 [I/tp, I]; what is left of each
            shard's first channel is zero. [0, I] where maxima are enough.
        amax: Largest |x_j| of each channel, float32 [I].
        tokens: Number of real tokens (`QuantizedModule.token_mask`), int64 (1,).
        flag: float32 (): 1 if the input was not finite or the sum left the fixed-point range.
        first_row: Global channel of `hessian`'s first row.
    """

    hessian: Tensor
    amax: Tensor
    tokens: Tensor
    flag: Tensor
    first_row: int

    def observe_(self, linear: QuantizedLinear, x: Tensor, dp_size: int) -> None:
        """Adds one microbatch, `x` as this rank's linear receives it."""
        rows = whole_input(linear, x)
        if rows.numel() == 0:
            return
        tokens: Tensor | int = len(rows)
        if linear.token_mask is not None:
            # Zeroed, not dropped: they add exact zeros, and the GEMM's shape stays that of every layout.
            real = to_device(linear.token_mask.t().reshape(-1), rows.device)
            rows, tokens = rows.masked_fill(~real[:, None], 0.0), real.sum()
        largest = rows.abs().amax(dim=0)
        finite = largest.isfinite()
        torch.maximum(self.amax, torch.where(finite, largest, 0.0), out=self.amax)
        bad = ~finite.all()
        if len(self.hessian):
            bad |= self._add_products_(linear, rows, MAX_SUM / dp_size)
        torch.maximum(self.flag, bad.float(), out=self.flag)
        self.tokens += tokens

    def _add_products_(self, linear: QuantizedLinear, rows: Tensor, limit: float) -> Tensor:
        """Adds this rank's part of XᵀX; bool (): a sum left its share of the range, `limit`."""
        bad = torch.zeros((), dtype=torch.bool, device=rows.device)
        bounds = shard_bounds(rows.shape[1], num_shards(linear))
        first = linear.tp_group.rank() * linear.shards_per_rank
        for shard in range(first, first + linear.shards_per_rank):
            low, high = bounds[shard], bounds[shard + 1]
            # XᵀX is symmetric: from the diagonal to the right.
            product = (rows[:, low:high].contiguous().t() @ rows[:, low:]).double()
            bad |= ~(product.abs().amax() <= limit)
            product.nan_to_num_(0.0).clamp_(-MAX_SUM, MAX_SUM).mul_(2.0**FRACTION_BITS).round_()
            total = self.hessian[low - self.first_row : high - self.first_row, low:]
            total += product.to(torch.int64)
            # Diagonals bound everything else; each rank stays below its share of the range.
            diagonal = total.diagonal().double() * 2.0**-FRACTION_BITS
            bad |= ~(diagonal.amax() <= limit)
        return bad

    def forget_(self) -> None:
        """As if no token had been seen; `flag` stays."""
        for tensor in (self.hessian, self.amax, self.tokens):
            tensor.zero_()

    def diagonal(self, linear: QuantizedLinear) -> Tensor:
        """Of `matrix`: squares of each channel, summed over tokens; float64 [I] (a collective)."""
        count, size = self.hessian.shape
        whole = torch.zeros(size, dtype=torch.int64, device=self.hessian.device)
        own = slice(self.first_row, self.first_row + count)
        whole[own] = self.hessian[:, own].diagonal()
        all_reduce_fused_([whole], dist.ReduceOp.SUM, linear.tp_group)
        return whole.double().mul_(2.0**-FRACTION_BITS)

    def matrix(self, linear: QuantizedLinear) -> Tensor:
        """XᵀX, float64 [I, I], the same on every rank of the tensor-parallel group (a collective)."""
        size = self.amax.numel()
        whole = torch.zeros(size, size, dtype=torch.int64, device=self.hessian.device)
        whole[self.first_row : self.first_row + self.hessian.shape[0]] = self.hessian
        all_reduce_fused_([whole], dist.ReduceOp.SUM, linear.tp_group)
        upper = whole.triu_().double().mul_(2.0**-FRACTION_BITS)
        return upper + upper.triu(1).t()


def input_width(linear: QuantizedLinear) -> int:
    """Global number of input features."""
    cut = linear.tp_group.size() if isinstance(linear, QuantRowParallelLinear) else 1
    return int(linear.weight.shape[1] * cut)


def _empty(
    linears: Mapping[str, QuantizedLinear], matrices: Collection[str]
) -> tuple[Tensor, dict[str, InputHessian]]:
    """One flat integer buffer, so that merging needs no copy, and its views."""
    extents: dict[str, tuple[int, int, int]] = {}
    for name, linear in linears.items():
        width = input_width(linear)
        bounds = shard_bounds(width, num_shards(linear))
        first = linear.tp_group.rank() * linear.shards_per_rank
        last = first + linear.shards_per_rank if name in matrices else first
        extents[name] = (bounds[first], bounds[last], width)
    size = sum((last - first) * width + 1 for first, last, width in extents.values())
    device = next((linear.weight.device for linear in linears.values()), torch.device("cpu"))
    flat = torch.zeros(size, dtype=torch.int64, device=device)
    input_hessians, start = {}, 0
    for name, (first, last, width) in extents.items():
        end = start + (last - first) * width
        input_hessians[name] = InputHessian(
            hessian=flat[start:end].view(last - first, width),
            amax=torch.zeros(width, device=device),
            tokens=flat[end : end + 1],
            flag=torch.zeros((), device=device),
            first_row=first,
        )
        start = end + 1
    return flat, input_hessians


def collect_input_hessians(
    linears: Mapping[str, QuantizedLinear],
    run_batches: Callable[[], None],
    *,
    group: dist.ProcessGroup,
    dp_group: dist.ProcessGroup,
    matrices: Collection[str] | None = None,
) -> dict[str, InputHessian]:
    """Runs the batches and merges: one SUM over `dp_group`, one MAX over `group`.

    Those of experts are merged over their copies and parts (`ExpertGroups`) instead.

    Args:
        linears: The watched ones of this rank, already computing layout-exactly.
        run_batches: The forward passes; a rank without batches just returns.
        group: TP x DP x CP of this pipeline stage.
        dp_group: DP x CP.
        matrices: Names of linears of which XᵀX is wanted, not maxima alone; None: of all.
    """
    experts = {n: x for n, x in linears.items() if x.expert_groups is not None}
    dense = {n: x for n, x in linears.items() if n not in experts}
    # Linears, the ranks whose counts add up, and those whose maxima merge, one after another.
    parts: list[tuple[dict[str, QuantizedLinear], Any, tuple[Any, ...]]]
    parts = [(dense, dp_group, (group,))]
    for groups in [x.expert_groups for x in experts.values() if x.expert_groups is not None][:1]:
        parts.append((experts, groups.dp, (groups.tp, groups.dp)))
    wanted = linears if matrices is None else matrices
    buffers = [_empty(part, wanted) for part, *_ in parts]
    input_hessians = {name: found for _, views in buffers for name, found in views.items()}
    copies = {name: dp.size() for part, dp, _ in parts for name in part}

    def observe(name: str, linear: Any, inputs: tuple[Tensor, ...]) -> None:
        input_hessians[name].observe_(linear, inputs[0], copies[name])

    with ExitStack() as stack:
        for name, linear in linears.items():
            stack.enter_context(linear.register_forward_pre_hook(partial(observe, name)))
        run_batches()
    for name, linear in linears.items():
        if linear.overflow is not None:
            flag = input_hessians[name].flag
            torch.maximum(flag, linear.overflow.float(), out=flag)
    for (flat, views), (_, dp, sharing) in zip(buffers, parts, strict=True):
        if views and dp.size() > 1:
            dist.all_reduce(flat, op=dist.ReduceOp.SUM, group=dp)
        maxima = [tensor for m in views.values() for tensor in (m.amax, m.flag)]
        for shared in sharing:
            all_reduce_fused_(maxima, dist.ReduceOp.MAX, shared)
    return {name: input_hessians[name] for name in linears}


def check_input_hessians(
    input_hessians: Mapping[str, InputHessian], idle: Collection[str] = ()
) -> None:
    """Raises UserError, naming the layer, for an input that was never seen or is not usable.

    `idle` are those of experts that no token reached, while others of their layer were reached.
    """
    for name, input_hessian in input_hessians.items():
        if not int(input_hessian.tokens) and name not in idle:
            raise UserError(
                f"{name}: no calibration token reached this layer. Check that the calibration "
                "batches run through the whole model."
            )
        if bool(input_hessian.flag):
            raise UserError(
                f"{name}: input or output is NaN, infinite or so large that sums of squares leave "
                f"2**{MAX_SUM.hex().split('p+')[1]} during calibration. Check the checkpoint and the "
                "calibration text, or calibrate with fewer sequences."
            )

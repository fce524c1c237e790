"""A low-rank adapter of a column- or row-parallel linear, cut like its weight; the rest is frozen.

| linear          | A              | B              | between the two: t = A x [S, B, r]               |
|-----------------|----------------|----------------|--------------------------------------------------|
| column-parallel | [r, I] whole   | [O/tp, r] cut  | gathered under sequence parallelism              |
| row-parallel    | [r, I/tp] cut  | [O, r] whole   | summed over TP, or scattered by tokens           |

So ranks exchange `t` alone. What is whole on every rank gets its whole gradient there, but under
sequence parallelism that of its own part, which Megatron adds up at the end of a step (parameters marked
`sequence_parallel`).

Merged adapters are part of the weight that is quantized, W + s B A. It is computed element by element in
float64, where products are exact, in the order of the rank: the same bits on every layout, and in the
checkpoint that is exported.

Initial values, and what dropout zeroes, are drawn whole and then cut: no layout changes them.
"""

from __future__ import annotations

import math
import zlib
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import (
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn

from mqat.models.adapters import Adapters

_CHUNK_ELEMENTS = 1 << 17  # float64 sums of so many elements stay in a CPU's cache


def merged_weight(weight: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:  # noqa: N803
    """`W + scale * B A` in the dtype of W [O, I]; each element depends on its row and column alone."""
    merged = torch.empty_like(weight)
    a = a_RI.double()
    step = max(1, _CHUNK_ELEMENTS // weight.shape[1])
    for first in range(0, len(weight), step):
        rows = slice(first, first + step)
        b = b_OR[rows].double()
        change = torch.zeros(len(b), weight.shape[1], dtype=torch.float64, device=weight.device)
        for k in range(len(a)):
            change.addcmul_(b[:, k, None], a[k])
        merged[rows] = (weight[rows].double() + scale * change).to(weight.dtype)
    return merged


class _Merge(torch.autograd.Function):
    """Gives `value` out as the merged weight; gradients of it go to A and B."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.scale = scale
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        dw = grads[0].float() * ctx.scale
        return None, (b.float().t() @ dw).to(a.dtype), (dw @ a.float().t()).to(b.dtype), None


class Adapter(nn.Module):
    """What is added to one linear; not part of `state_dict()` (`parallel/checkpoint.py` saves it).

    Args:
        linear: A Megatron linear, whose weight is [O, I] on this rank.
        name: Its global name.
        adapters: Rank, strength, dropout, and whether it is merged.
        seed: Of initial values and dropout.

    Attributes:
        linear_in: A.
        linear_out: B, zero at first.
    """

    def __init__(self, linear: Any, name: str, adapters: Adapters, seed: int) -> None:
        super().__init__()
        self.name, self.adapters, self._seed = name, adapters, seed
        self.is_row = isinstance(linear, RowParallelLinear)
        self.tp_group, self._config = linear.tp_group, linear.config
        self._columns = int(linear.input_size)
        rows, columns = linear.local_shape if linear.is_packed else linear.weight.shape
        like, rank = linear.weight, adapters.rank
        self.linear_in = nn.Parameter(
            torch.empty(rank, columns, dtype=like.dtype, device=like.device)
        )
        self.linear_out = nn.Parameter(
            torch.empty(rows, rank, dtype=like.dtype, device=like.device)
        )
        is_cut = self.tp_group.size() > 1
        for parameter, axis, cut in (
            (self.linear_in, 1, is_cut and self.is_row),
            (self.linear_out, 0, is_cut and not self.is_row),
        ):
            # Counted once in the gradient norm: from every rank if cut, else from the first.
            set_tensor_model_parallel_attributes(parameter, cut, axis, 1)
            parameter.allreduce = True  # type: ignore[attr-defined]
            parameter.sequence_parallel = self.is_cut_by_tokens and not cut  # type: ignore[attr-defined]
        self.begin_step(None)
        self.reset_()

    @property
    def is_cut_by_tokens(self) -> bool:
        """Whether each rank has other tokens between two linears."""
        return bool(self._config.sequence_parallel) and self.tp_group.size() > 1

    @torch.no_grad()
    def reset_(self) -> None:
        """A as peft draws it, uniform within 1/sqrt(in) (Kaiming, a = sqrt(5)); B zero."""
        shape, bound = (self.adapters.rank, self._columns), 1 / math.sqrt(self._columns)
        whole = torch.empty(shape).uniform_(-bound, bound, generator=self._generator("in"))
        columns = self.linear_in.shape[1]
        first = self.tp_group.rank() * columns if self.is_row else 0
        self.linear_in.copy_(whole[:, first : first + columns])
        self.linear_out.zero_()

    def _generator(self, *salt: object, device: str | torch.device = "cpu") -> torch.Generator:
        text = " ".join(map(str, (self._seed, self.name, *salt)))
        return torch.Generator(device).manual_seed(zlib.crc32(text.encode()))

    def begin_step(self, step: int | None) -> None:
        """Counts microbatches from the first again, for dropout; None: the step after the last."""
        last = getattr(self, "_step", -1)
        self._step = last + 1 if step is None else step
        self._microbatches = [0, 0]  # forward passes without and with a graph

    def _dropped(self, x: Tensor) -> Tensor:
        """`x` with dropout in training.

        The draw is that of the step, the microbatch's number in the global batch, and the element. A
        pass that is recomputed draws the same: those without a graph are counted by themselves.
        """
        p = self.adapters.dropout
        if not (self.training and p):
            return x
        has_graph = torch.is_grad_enabled()
        number = self._microbatches[has_graph]
        self._microbatches[has_graph] += 1
        number = number * parallel_state.get_data_parallel_world_size()
        number += parallel_state.get_data_parallel_rank()
        salt = (self._step, number, parallel_state.get_context_parallel_rank())
        tp, rank = self.tp_group.size(), self.tp_group.rank()
        tokens = x.shape[0] * (tp if self.is_cut_by_tokens and not self.is_row else 1)
        shape = (tokens, x.shape[1], self._columns)
        drawn = torch.rand(
            shape, generator=self._generator(*salt, device=x.device), device=x.device
        )
        part = (
            drawn.chunk(tp, dim=-1 if self.is_row else 0)[rank] if drawn.shape != x.shape else drawn
        )
        return x.masked_fill(part < p, 0.0) / (1 - p)

    def forward(self, x: Tensor) -> Tensor:
        """`s B A x`, of the linear's input to its output: [S/tp, B, I] to [S, B, O/tp] and so on."""
        inner = F.linear(self._dropped(x), self.linear_in)
        if self.is_row and self.is_cut_by_tokens:
            inner = reduce_scatter_to_sequence_parallel_region(inner, group=self.tp_group)
        elif self.is_row:
            inner = reduce_from_tensor_model_parallel_region(inner, group=self.tp_group)
        elif self.is_cut_by_tokens:
            inner = gather_from_sequence_parallel_region(inner, group=self.tp_group)
        else:
            inner = copy_to_tensor_model_parallel_region(inner, group=self.tp_group)
        return F.linear(inner * self.adapters.scale, self.linear_out)

    @property
    def versions(self) -> tuple[int, int]:
        """Change with the parameters' values."""
        return self.linear_in._version, self.linear_out._version

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """The merged weight of this rank's, without a graph."""
        return merged_weight(weight, self.linear_in, self.linear_out, self.adapters.scale)

    def carried_by(self, value: Tensor) -> Tensor:
        """`value` as the merged weight, whose gradient goes to A and B."""
        a, b = self.linear_in, self.linear_out
        if not self.is_cut_by_tokens:  # else Megatron adds up what is whole (see above)
            if self.is_row:
                b = copy_to_tensor_model_parallel_region(b, group=self.tp_group)
            else:
                a = copy_to_tensor_model_parallel_region(a, group=self.tp_group)
        carried: Tensor = _Merge.apply(value, a, b, self.adapters.scale)  # type: ignore[no-untyped-call]
        return carried

    def _save_to_state_dict(self, *_: Any, **__: Any) -> None:
        """Nothing: adapters are no more part of the model's own keys than quantizers."""

    def _load_from_state_dict(self, *_: Any, **__: Any) -> None:
        """Nothing, likewise."""

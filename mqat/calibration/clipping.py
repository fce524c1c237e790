"""What a clipping method is: how it looks at shards of a weight, and what it makes scales from.

Legend: a shard is [rows, I] (`tp_invariant_shards.py`); `G` groups of a row; `K` numbers a method notes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from mqat.quant.granularity import PerGroup
from mqat.quant.scheme import TensorScheme


@dataclass(frozen=True)
class WeightShard:
    """Some rows of a weight, whole in width, and what is known of them.

    Attributes:
        weight: float32 [rows, I].
        statistic: Maxima in the granularity's scale shape, or (2, ...) ranges; of the whole tensor where
            that has one scale.
        scheme: Of the weight.
        global_amax: Behind the upper scale of two levels, float32 (1,); else None.
        hessian: XᵀX of the input, float64 [I, I]; None unless the method asks for it.
    """

    weight: Tensor
    statistic: Tensor
    scheme: TensorScheme
    global_amax: Tensor | None = None
    hessian: Tensor | None = None

    @property
    def group_width(self) -> int:
        """Elements along a row that share a scale."""
        granularity = self.scheme.granularity
        return granularity.size if isinstance(granularity, PerGroup) else self.weight.shape[1]


@dataclass(frozen=True)
class ClippingMethod:
    """A way to choose what weight scales are made from.

    Attributes:
        measure: Shard -> what the choice is made by, float64 [K, rows, G]. Where the tensor has one
            scale, it is added up over all rows and groups of all shards, to [K, 1, 1].
        choose: (statistic, measured, scheme) -> the statistic that scales are made from.
        check: (name of a linear, scheme of its weight) -> raises UserError for a scheme that the method
            cannot choose for.
        needs_input_hessian: Whether shards have their `hessian`.
        headroom: How far above its maximum a group's choice may lie. The upper scale of two levels,
            made from the largest maximum times this, leaves room for it.
    """

    measure: Callable[[WeightShard], Tensor]
    choose: Callable[[Tensor, Tensor, TensorScheme], Tensor]
    check: Callable[[str, TensorScheme], None] = lambda name, scheme: None
    needs_input_hessian: bool = False
    headroom: float = 1.0


def grouped(x: Tensor, width: int) -> Tensor:
    """[rows, I] -> [rows, G, width], the last group filled with zeros."""
    return F.pad(x, (0, -x.shape[1] % width)).view(x.shape[0], -1, width)

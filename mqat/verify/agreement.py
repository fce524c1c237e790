"""How far two models' logits may be apart: as far as one is from itself under rounding noise.

Two faithful implementations sum in other orders. A number on the border of two codes then falls on
either side, and layer by layer that grows into whatever the model makes of it: KL divergences of 1e-9 or
of 0.02, for the same export and the same error in every linear. So no fixed number tells a right export
from a wrong one; the model's own answer to noise of the size of rounding, measured beside, does.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Relative noise on the input of every linear: above what a computation in this dtype rounds there.
NOISE = {torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
# The same noise drawn again gives a KL that differs by less than this factor (twice in amplitude).
_FACTOR = 4.0
_SMALLEST_KL = 1e-6  # float32 log-softmax over a large vocabulary


@dataclass(frozen=True)
class Agreement:
    """Of two logit tensors [b, s, V].

    Attributes:
        kl: From the first next-token distribution to the second, in nats, mean over positions.
        top1: Share of positions with the same most likely token.
        positions: How many were compared.
    """

    kl: float
    top1: float
    positions: int

    def __str__(self) -> str:
        return f"KL {self.kl:.2e}, same top token {self.top1:.1%}"

    @property
    def largest_kl(self) -> float:
        """Largest KL that such noise explains: `_FACTOR` times `kl`, at least `_SMALLEST_KL`."""
        return max(_FACTOR * self.kl, _SMALLEST_KL)

    @property
    def least_top1(self) -> float:
        """Smallest share that it explains: three standard errors of a difference of two below `top1`."""
        share, n = 1 - self.top1, self.positions
        return self.top1 - 3 * math.sqrt(2 * max(share * (1 - share), 1 / n) / n)

    def allows(self, other: "Agreement") -> bool:
        """Whether another pair is as near as two draws of noise are."""
        return other.kl <= self.largest_kl and other.top1 >= self.least_top1


def agreement(first: Tensor, second: Tensor) -> Agreement:
    """Of two logit tensors [..., V] over all positions."""
    p, q = first.float().log_softmax(-1), second.float().log_softmax(-1)
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    same = p.argmax(-1) == q.argmax(-1)
    return Agreement(kl, float(same.float().mean()), same.numel())


def add_noise(x: Tensor, size: float, generator: torch.Generator) -> Tensor:
    """`x` with relative Gaussian noise, drawn on the CPU; size 0: x itself."""
    if not size:
        return x
    noise = torch.randn(x.shape, generator=generator).to(x)
    return x * (1 + size * noise)

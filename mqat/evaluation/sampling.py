"""How the next token is chosen from logits: the likeliest, or at random from some of them."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from mqat.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """Temperature first, then the k likeliest, then the fewest that together have probability p.

    A prompt's random numbers come from the seed and its number alone, so that neither batches nor
    layouts change what is drawn. Tokens are drawn as the largest of logits with Gumbel noise: rounding
    of the logits changes a choice only between two that are as good as equal.

    Attributes:
        temperature: Logits are divided by it; 0: always the likeliest token.
        top_k: Tokens to choose from; None: all.
        top_p: Their probability together; 1: all.
        seed: Of the random numbers.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature={self.temperature:g} must be 0 (greedy) or positive.")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k={self.top_k} must be at least 1; leave it out for all tokens.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p:g} must be above 0 and at most 1.")
        if self.temperature == 0 and (self.top_k is not None or self.top_p < 1):
            raise UserError(
                f"top_k={self.top_k}, top_p={self.top_p:g} with temperature 0: the likeliest token is "
                "always taken; give a temperature, such as 0.7, or leave them out."
            )

    def generator(self, number: int) -> torch.Generator:
        """Random numbers of a prompt, by its number."""
        digest = hashlib.sha256(f"{self.seed} {number}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def choose(self, logits: Tensor, generator: torch.Generator) -> int:
        """A token, of logits float32 [V] on the CPU.

        Raises:
            UserError: One of them is NaN.
        """
        if logits.isnan().any():
            raise UserError(
                "the model's logits are NaN, so no token is the next one; its training diverged or its "
                "weights overflow: take an earlier checkpoint, or compute in --precision 32."
            )
        if self.temperature == 0:
            return int(logits.argmax())
        kept = self.kept(logits.double() / self.temperature)
        uniform = torch.rand(len(logits), generator=generator, dtype=torch.float64)
        noise = -torch.log(-torch.log(uniform.clamp_min(1e-300)))
        return int((kept + noise).argmax())

    def kept(self, logits: Tensor) -> Tensor:
        """Logits [V], minus infinity where a token is not to be chosen; all that equal the k-th stay."""
        if self.top_k is not None and self.top_k < len(logits):
            least = logits.topk(self.top_k).values[-1]
            logits = logits.masked_fill(logits < least, float("-inf"))
        if self.top_p < 1:
            ordered, order = logits.sort(descending=True, stable=True)
            probabilities = ordered.softmax(dim=-1)
            before = probabilities.cumsum(dim=-1) - probabilities
            logits = logits.index_fill(0, order[before >= self.top_p], float("-inf"))
        return logits

"""Which elements of a tensor share one scale; `str` of a granularity is its name in checkpoints."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from mqat.errors import UserError

Reduction = Callable[
    ..., Tensor
]  # of a tensor, over the dimensions `dim`; of zeros it is at most 0


@dataclass(frozen=True)
class PerTensor:
    """One scale, shape (1,)."""

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Always (1,)."""
        return (1,)

    def expand(self, scale: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Scale in a shape that broadcasts against a tensor of `shape`."""
        return scale

    def largest(self, x: Tensor, by: Reduction = torch.amax) -> Tensor:
        """Largest element of `x`, (1,), or what else `by` finds."""
        return by(x, dim=tuple(range(x.dim()))).reshape(1)

    def __str__(self) -> str:
        return "tensor"


@dataclass(frozen=True)
class PerChannel:
    """One scale per row of a matrix [O, I], shape (O,)."""

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """(O,)."""
        return tuple(shape[:-1])

    def expand(self, scale: Tensor, shape: tuple[int, ...]) -> Tensor:
        """(O, 1)."""
        return scale[..., None]

    def largest(self, x: Tensor, by: Reduction = torch.amax) -> Tensor:
        """Largest element of each row, (O,)."""
        return by(x, dim=-1)

    def __str__(self) -> str:
        return "channel"


@dataclass(frozen=True)
class PerToken(PerChannel):
    """One scale per token of [..., I], shape [...]: rows again, but known only when they arrive."""

    def __str__(self) -> str:
        return "token"


@dataclass(frozen=True)
class PerGroup:
    """One scale per `size` consecutive elements of a row of [..., I], shape (..., ceil(I / size)).

    If `size` does not divide I, the last group of each row is shorter, everywhere alike.
    """

    size: int

    def __post_init__(self) -> None:
        """Raises UserError for a size below one."""
        if self.size < 1:
            raise UserError(f"group_size={self.size} must be at least 1.")

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """(..., G)."""
        return (*shape[:-1], -(-shape[-1] // self.size))

    def expand(self, scale: Tensor, shape: tuple[int, ...]) -> Tensor:
        """(..., I): every scale repeated over its group."""
        return scale.repeat_interleave(self.size, dim=-1)[..., : shape[-1]]

    def largest(self, x: Tensor, by: Reduction = torch.amax) -> Tensor:
        """Largest element of each group, (..., G); at least 0 where a group is short."""
        short = -x.shape[-1] % self.size
        padded = F.pad(x, (0, short)) if short else x  # padding by nothing copies
        return by(padded.reshape(*self.scale_shape(tuple(x.shape)), self.size), dim=-1)

    def __str__(self) -> str:
        return f"group:{self.size}"


@dataclass(frozen=True)
class PerBlock:
    """One scale per square of `size` x `size` of [O, I]; squares at the ends may be cut."""

    size: int

    def __post_init__(self) -> None:
        """Raises UserError for a size below one."""
        if self.size < 1:
            raise UserError(f"block size {self.size} must be at least 1.")

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """(ceil(O / size), ceil(I / size))."""
        rows, cols = shape
        return (-(-rows // self.size), -(-cols // self.size))

    def expand(self, scale: Tensor, shape: tuple[int, ...]) -> Tensor:
        """(O, I): every scale repeated over its square."""
        rows = scale.repeat_interleave(self.size, dim=0)[: shape[0]]
        return rows.repeat_interleave(self.size, dim=1)[:, : shape[1]]

    def largest(self, x: Tensor, by: Reduction = torch.amax) -> Tensor:
        """Largest element of each square; at least 0 where a square is cut."""
        rows, cols = self.scale_shape(tuple(x.shape))
        padded = F.pad(x, (0, -x.shape[1] % self.size, 0, -x.shape[0] % self.size))
        return by(padded.reshape(rows, self.size, cols, self.size), dim=(1, 3))

    def __str__(self) -> str:
        return f"block:{self.size}"


Granularity = PerTensor | PerChannel | PerToken | PerGroup | PerBlock

_PLAIN: dict[str, Granularity] = {
    str(kind): kind for kind in (PerTensor(), PerChannel(), PerToken())
}
_SIZED: dict[str, type[PerGroup] | type[PerBlock]] = {"group": PerGroup, "block": PerBlock}


def granularity_from_str(text: str) -> Granularity:
    """Inverse of `str(granularity)`.

    Raises:
        UserError: Not one of `tensor`, `channel`, `token`, `group:<size>`, `block:<size>`.
    """
    if text in _PLAIN:
        return _PLAIN[text]
    kind, _, size = text.partition(":")
    if kind in _SIZED and size.isdigit():
        return _SIZED[kind](int(size))
    raise UserError(
        f"granularity {text!r}: expected 'tensor', 'channel', 'token', 'group:<size>' or "
        "'block:<size>'."
    )


def grouped_view(x: Tensor, scale: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor]:
    """`x` and `scale` in shapes that broadcast; avoids a full-size scale when groups divide."""
    if isinstance(granularity, PerGroup) and x.shape[-1] % granularity.size == 0:
        return x.reshape(*scale.shape, granularity.size), scale[..., None]
    return x, granularity.expand(scale, tuple(x.shape))

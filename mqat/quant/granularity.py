"""Which elements of a tensor share one scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


@dataclass(frozen=True)
class PerTensor:
    """One scale, shape (1,)."""

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Always (1,)."""
        return (1,)

    def expand(self, scale: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Scale in a shape that broadcasts against a tensor of `shape`."""
        return scale

    def amax(self, x: Tensor) -> Tensor:
        """Largest |x|, float32 (1,)."""
        return x.detach().abs().amax().float().reshape(1)

    def __str__(self) -> str:
        """Name used in checkpoints."""
        return "tensor"


@dataclass(frozen=True)
class PerChannel:
    """One scale per row of a matrix [O, I], shape (O,)."""

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """(O,)."""
        return (shape[0],)

    def expand(self, scale: Tensor, shape: tuple[int, ...]) -> Tensor:
        """(O, 1)."""
        return scale[:, None]

    def amax(self, x: Tensor) -> Tensor:
        """Largest |x| of each row, float32 (O,)."""
        return x.detach().abs().amax(dim=1).float()

    def __str__(self) -> str:
        """Name used in checkpoints."""
        return "channel"


@dataclass(frozen=True)
class PerGroup:
    """One scale per `size` consecutive elements of a row of [O, I], shape (O, ceil(I / size)).

    If `size` does not divide I, the last group of each row is shorter, everywhere alike.
    """

    size: int

    def __post_init__(self) -> None:
        """Raises ValueError for a size below one."""
        if self.size < 1:
            raise ValueError(f"group_size={self.size} must be at least 1.")

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """(O, G)."""
        return (shape[0], -(-shape[1] // self.size))

    def expand(self, scale: Tensor, shape: tuple[int, ...]) -> Tensor:
        """(O, I): every scale repeated over its group."""
        repeated = scale[:, :, None].expand(-1, -1, self.size)
        return repeated.reshape(scale.shape[0], -1)[:, : shape[1]]

    def amax(self, x: Tensor) -> Tensor:
        """Largest |x| of each group, float32 (O, G)."""
        magnitude = F.pad(x.detach().abs(), (0, -x.shape[1] % self.size))
        return magnitude.reshape(*self.scale_shape(tuple(x.shape)), self.size).amax(dim=2).float()

    def __str__(self) -> str:
        """Name used in checkpoints."""
        return f"group:{self.size}"


Granularity = PerTensor | PerChannel | PerGroup


def granularity_from_str(text: str) -> Granularity:
    """Inverse of `str(granularity)`.

    Raises:
        ValueError: Not one of `tensor`, `channel`, `group:<size>`.
    """
    if text == "tensor":
        return PerTensor()
    if text == "channel":
        return PerChannel()
    kind, _, size = text.partition(":")
    if kind == "group" and size.isdigit():
        return PerGroup(int(size))
    raise ValueError(f"granularity {text!r}: expected 'tensor', 'channel' or 'group:<size>'.")


def grouped_view(x: Tensor, scale: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor]:
    """`x` and `scale` in shapes that broadcast; avoids a full-size scale when groups divide."""
    if isinstance(granularity, PerGroup) and x.shape[-1] % granularity.size == 0:
        return x.reshape(*scale.shape, granularity.size), scale[..., None]
    return x, granularity.expand(scale, tuple(x.shape))


def empty_scale(granularity: Granularity, shape: tuple[int, ...] | None) -> Tensor:
    """Zero-filled scale for a tensor of `shape`; None stands for any activation shape."""
    return torch.zeros((1,) if shape is None else granularity.scale_shape(shape))

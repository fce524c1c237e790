"""Low-rank adapters (LoRA) of a model: which linears have one, of which rank, and what is served.

A linear computes `W x + alpha / rank * B A x`, with A [rank, in] and B [out, rank]; a fused one has one
A for all its parts. Source: Hu et al. 2021, arXiv:2106.09685.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mqat.models.decoder import DecoderConfig
from mqat.models.structure import Linear, adapter_key, split_name


@dataclass(frozen=True)
class Adapters:
    """All adapters of a model.

    Attributes:
        names: Global names of the linears that have one, in model order.
        rank: Of every one.
        alpha: Strength; what an adapter adds is multiplied by `alpha / rank`.
        dropout: Probability with which an adapter's input element is zero in training.
        is_merged: The weight that is quantized is `W + alpha / rank * B A`; otherwise the adapter is
            added, in floats, to what the linear computes.
    """

    names: tuple[str, ...]
    rank: int
    alpha: float
    dropout: float = 0.0
    is_merged: bool = False

    @property
    def scale(self) -> float:
        """Factor of `B A`."""
        return self.alpha / self.rank

    def to_dict(self) -> dict[str, Any]:
        """For `mqat.json`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Adapters":
        """The inverse."""
        return cls(**{**values, "names": tuple(values["names"])})

    def shapes(self, model: DecoderConfig) -> dict[str, tuple[int, ...]]:
        """Checkpoint key -> global shape."""
        found: dict[str, tuple[int, ...]] = {}
        for name in self.names:
            linear: Linear = model.linear(split_name(name)[1])
            rows, columns = linear.shape(model)
            found[adapter_key(name, "in")] = (self.rank, columns)
            found[adapter_key(name, "out")] = (rows, self.rank)
        return found

"""What a linear of a checkpoint must look like when served: codes on its frozen grid, rounded here.

The rounding is done again in lines of its own, so that a mistake of the exporter cannot hide.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mqat.checkpoints.reader import CheckpointReader
from mqat.quant.scheme import LinearScheme
from mqat.verify.operands import fp4_codes

# Smallest and largest code of a weight, by the name of its integer format.
_RANGES = {
    "int8": (-127, 127),
    "int8_loader": (-128, 127),
    "int4": (-8, 7),
    "int4_even": (-8, 7),
    "uint4": (0, 15),
}


@dataclass(frozen=True)
class TrainedLinear:
    """One linear of the checkpoint."""

    checkpoint: CheckpointReader
    layer: int
    linear: str

    @property
    def name(self) -> str:
        """Global name."""
        return f"decoder.layers.{self.layer}.{self.linear}"

    @property
    def scheme(self) -> LinearScheme | None:
        """None if it is not quantized."""
        return self.checkpoint.layers.get(self.name)

    def weight(self) -> Tensor:
        """Float32 [O, I]."""
        key, layer = f"decoder.layers.{self.linear}.weight", slice(self.layer, self.layer + 1)
        return self.checkpoint.read(key, (layer,))[0].float()

    def bias(self) -> Tensor | None:
        """[O], as stored; None: there is none."""
        key = f"decoder.layers.{self.linear}.bias"
        if not self.checkpoint.has(key):
            return None
        return self.checkpoint.read(key, (slice(self.layer, self.layer + 1),))[0]

    def scale(self) -> Tensor:
        """The frozen weight scale."""
        return self.checkpoint.read(f"quantizers.{self.name}.weight_scale")

    def frozen(self, part: str) -> Tensor:
        """Another frozen tensor: `input_scale`, `weight_zero_point`, `weight_global_scale`, ..."""
        return self.checkpoint.read(f"quantizers.{self.name}.{part}")

    def steps(self, width: int, part: Tensor | None = None) -> Tensor:
        """The scale, or something shaped like it, in a shape that broadcasts over [O, width]."""
        scale, scheme = self.scale() if part is None else part, self.scheme
        assert scheme is not None and scheme.weight is not None
        granularity = str(scheme.weight.granularity)
        if granularity.startswith("group:"):
            group_size = int(granularity.removeprefix("group:"))
            return scale.repeat_interleave(group_size, dim=1)[:, :width]
        return scale[:, None] if granularity == "channel" else scale

    def codes(self) -> Tensor:
        """Codes of weight / step, rounded to nearest, ties to even.

        int8 for integers, moved to -8..7 where they are unsigned; float8 for FP8; for FP4 uint8, one
        code in a byte.
        """
        scheme, weight = self.scheme, self.weight()
        assert scheme is not None and scheme.weight is not None
        fmt = scheme.weight.format.name
        ratio = weight / self.steps(weight.shape[1])
        if fmt == "fp8_e4m3":
            return ratio.clamp(-448, 448).to(torch.float8_e4m3fn)
        if fmt == "fp4_e2m1":
            return fp4_codes(ratio)
        low, high = _RANGES[fmt]
        codes = ratio.round()
        if scheme.weight.is_asymmetric:
            codes += self.steps(weight.shape[1], self.frozen("weight_zero_point"))
        middle = (high + 1) // 2 if low == 0 else 0
        return (codes.clamp(low, high) - middle).to(torch.int8)

    def blocks(self, tensor: Tensor) -> list[Tensor]:
        """Rows of a fused tensor by projection: [q, k, v], [gate, up], or [all]."""
        if self.linear == "mlp.linear_fc1":
            return list(tensor.chunk(2))
        if self.linear != "self_attention.linear_qkv":
            return [tensor]
        model = self.checkpoint.model
        per_group = model.num_attention_heads // model.num_query_groups
        grouped = tensor.unflatten(0, (model.num_query_groups, per_group + 2, model.head_dim))
        return [block.flatten(0, 2) for block in grouped.split([per_group, 1, 1], dim=1)]

"""Every linear and layer of an export on the trainer's own inputs, so that no error grows on the way.

What a linear or layer makes of an input that is the same to the bit can be told apart from rounding; the
logits at the end of a deep model cannot: there the model decides what rounding becomes.

- A linear's output is off by sums in another order only: `_LINEAR`.
- What a layer adds to its input is off by numbers inside that fall on the other side of a border between
  two codes, a quantization step each: `_LAYER`, and `_SUM` for the rounding of the residual sum.

Errors are relative, of a token, and their median over tokens counts: one for which a large number falls
on the other side is an exception, and a wrong tensor is wrong for all.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mqat.checkpoints.reader import CheckpointReader
from mqat.verify.checkpoint_linear import CheckpointLinear
from mqat.verify.decoder import SERVED_OTHERWISE, Decoder

_LINEAR = {torch.float32: 1e-5, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}
_LAYER = {torch.float32: 1e-2, torch.float16: 0.1, torch.bfloat16: 0.25}
_SUM = {torch.float32: 1e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


@dataclass
class LayerComparison:
    """Judges layers as they are computed; one of the trainer's ranks calls it for each.

    Attributes:
        decoder: Of the export.
        checkpoint: It was made from.
        dtype: In which the trainer computes.
        problems: What differs beyond the limits above.
        worst_linear: Largest median error of a linear.
        worst_layer: Largest median error of a layer.
    """

    decoder: Decoder
    checkpoint: CheckpointReader
    dtype: torch.dtype
    problems: list[str] = field(default_factory=list)
    worst_linear: float = 0.0
    worst_layer: float = 0.0

    def __call__(
        self, number: int, x: Tensor, y: Tensor, linears: Mapping[str, tuple[Tensor, Tensor]]
    ) -> None:
        """Compares one layer.

        Args:
            number: Global, from zero.
            x: Its input [b, s, hidden], whole.
            y: Its output, likewise.
            linears: Name in the layer -> input [b, s, I] and output [b, s, O], whole, bias added.
        """
        for name, (given, output) in linears.items():
            rows = given.float().flatten(0, 1), output.float().flatten(0, 1)
            self._compare_linear(number, name, *rows)
        x, y = x.float(), y.float()
        error, added = (self.decoder.layer(number, x) - y).norm(dim=-1), (y - x).norm(dim=-1)
        rounding = _SUM[self.dtype] * y.norm(dim=-1)
        found = _median((error - rounding).clamp_min(0) / added.clamp_min(1e-30))
        self.worst_layer = max(self.worst_layer, found)
        limit = _LAYER[self.dtype] + SERVED_OTHERWISE * self.decoder.serves_otherwise(number)
        if not found <= limit:
            self.problems.append(
                f"layer {number}: on the trainer's own input it adds something else, by {found:.2e} of "
                f"what it adds (median over tokens, at most {limit:g})"
            )

    def found(self) -> tuple[list[str], float, float]:
        """Problems, and the largest errors, so far."""
        return self.problems, self.worst_linear, self.worst_layer

    def _compare_linear(self, number: int, name: str, x: Tensor, y: Tensor) -> None:
        facts = self.decoder.model.facts_of(number % self.decoder.model.layers_per_stage)
        trained = CheckpointLinear(self.checkpoint, facts, number, name).by_part(y.t())
        served: dict[str, Tensor] = {}
        for role in trained:
            if role not in served:
                served |= self.decoder.linears(number, role, x)
        modules, is_alike = self.decoder.modules(number), self.decoder.is_compared_alike
        changed = [
            m for m in modules if m.storage.is_reloaded or (m.shares_input_scale and not is_alike)
        ]
        otherwise = {part.role for module in changed for part in module.parts}
        for role, wanted in trained.items():
            limit = SERVED_OTHERWISE if role in otherwise else _LINEAR[self.dtype]
            error = (served[role] - wanted).norm(dim=0) / wanted.norm(dim=0).clamp_min(1e-30)
            found = _median(error)
            self.worst_linear = max(self.worst_linear, found)
            if not found <= limit:
                self.problems.append(
                    f"layer {number}, {name}, {role}: on the trainer's own input the output is off by "
                    f"{found:.2e} (median over tokens, at most {limit:g})"
                )


def _median(errors: Tensor) -> float:
    return float(errors.flatten().median())

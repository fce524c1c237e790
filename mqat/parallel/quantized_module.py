"""What calibration, checkpoints and schedules know of a module: its name and its quantizers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mqat.quant.quantizer import Quantizer


class QuantizedModule(nn.Module):
    """A module some of whose tensors pass through quantizers.

    The quantizer called `weight`, if there is one, belongs to the parameter `weight`; all others see
    activations, and every rank of the stage ends up with the same scale for those.

    Attributes:
        quantized_name: Global name, such as `decoder.layers.3.mlp.linear_fc1`.
        tp_group: Ranks that hold other parts of it.
        parts: Number of weights fused along the output rows that are cut separately (gate, up).
        is_calibrating: Compute unquantized, whatever is frozen.
    """

    quantized_name: str
    tp_group: Any
    weight: Tensor
    parts: int = 1
    is_calibrating: bool = False

    @property
    def quantizers(self) -> dict[str, Quantizer]:
        """Kind (`weight`, `input`, `kv`, ...) -> quantizer."""
        raise NotImplementedError

    def begin_calibration(self) -> None:
        """Computes unquantized from now on."""
        self.is_calibrating = True

    def end_calibration(self) -> None:
        """Back to the normal mode."""
        self.is_calibrating = False


def quantized_modules(model: Any) -> dict[str, QuantizedModule]:
    """Modules of this rank by global name, for a model or a list of pipeline chunks."""
    chunks = model if isinstance(model, (list, tuple)) else [model]
    return {
        module.quantized_name: module
        for chunk in chunks
        for module in chunk.modules()
        if isinstance(module, QuantizedModule)
    }


def all_quantizers(model: Any) -> list[Quantizer]:
    """Every quantizer of this rank."""
    modules = quantized_modules(model).values()
    return [quantizer for module in modules for quantizer in module.quantizers.values()]

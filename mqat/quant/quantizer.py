"""A quantizer's life: idle, observing, frozen at a scale; then on or off."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mqat.quant.functional import compute_scale, dequantize, fake_quantize, quantize
from mqat.quant.granularity import empty_scale
from mqat.quant.observers import ActivationObserver
from mqat.quant.scheme import TensorScheme


class Quantizer(nn.Module):
    """Fake-quantizes one operand of a linear once its scale is known.

    Attributes:
        scheme: Format, granularity and grid of scales.
        name: Global name, for messages.
        scale: float32 step, zero until frozen. Not part of `state_dict()`: checkpoints hold it as a
            sharded tensor of its own.
        is_frozen: The scale is final.
        is_enabled: Off: `forward` is the identity (delayed fake quantization).
        observer: Present while observing (activations only).
    """

    scale: Tensor

    def __init__(self, scheme: TensorScheme, shape: tuple[int, ...] | None, name: str) -> None:
        super().__init__()
        self.scheme = scheme
        self.name = name
        self.is_frozen = False
        self.is_enabled = True
        self.observer: ActivationObserver | None = None
        self.register_buffer("scale", empty_scale(scheme.granularity, shape), persistent=False)

    def start_observing(self, method: str = "max") -> None:
        """Forgets the scale and collects statistics of what passes through, unchanged."""
        self.is_frozen = False
        self.observer = ActivationObserver(method).to(self.scale.device)

    def freeze_(self, amax: Tensor) -> None:
        """Fixes the scale for `amax`, already merged over ranks; observing ends."""
        fmt, scale_dtype = self.scheme.format, self.scheme.scale_dtype
        self.load_scale_(compute_scale(amax, fmt, scale_dtype=scale_dtype))

    def load_scale_(self, scale: Tensor) -> None:
        """Fixes the scale itself, as read from a checkpoint.

        Raises:
            ValueError: Other shape than this quantizer's, or a step that is not positive and finite.
        """
        if scale.shape != self.scale.shape:
            raise ValueError(
                f"{self.name}: scale has shape {tuple(scale.shape)}, expected "
                f"{tuple(self.scale.shape)}."
            )
        # Waits for the device, once per calibration or load: a step of zero or NaN trains silently.
        bad = ~((scale > 0) & scale.isfinite())
        if bool(bad.any()):
            raise ValueError(
                f"{self.name}: {int(bad.sum())} of {scale.numel()} scales are not positive finite "
                f"numbers (first: {float(scale[bad][0])}). Calibrate again, or restore another "
                "checkpoint."
            )
        self.scale.copy_(scale)
        self.observer = None
        self.is_frozen = True

    def reset(self) -> None:
        """Back to uncalibrated: `forward` is the identity again."""
        self.scale.zero_()
        self.observer = None
        self.is_frozen = False

    def forward(self, x: Tensor) -> Tensor:
        """Observes, fake-quantizes, or passes `x` through, according to the state."""
        if self.observer is not None:
            self.observer.observe_(x)
            return x
        if self.is_frozen and self.is_enabled:
            return fake_quantize(x, self.scale, self.scheme.format, self.scheme.granularity)
        return x

    def quantize(self, x: Tensor) -> Tensor:
        """Codes of `x`."""
        return quantize(x, self.scale, self.scheme.format, self.scheme.granularity)

    def dequantize(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Values of `codes`."""
        return dequantize(codes, self.scale, self.scheme.granularity, dtype)

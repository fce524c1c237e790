"""A quantizer's life: idle, observing, frozen; then on or off, its scale final or trained further."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mqat.errors import UserError
from mqat.quant.formats import QuantFormat
from mqat.quant.functional import fake_quantize
from mqat.quant.learned import Rule, check_learnable, fake_quantize_learned, served_scale
from mqat.quant.observers import ActivationObserver
from mqat.quant.qparams import compute_qparams, frozen_qparams, statistic_of
from mqat.quant.scheme import TensorScheme


class Quantizer(nn.Module):
    """Fake-quantizes one operand of a linear once its scale is known.

    Frozen tensors are not part of `state_dict()`: checkpoints hold them as sharded tensors.

    Attributes:
        scheme: Format, granularity, grid of scales, zero point, static or dynamic.
        name: Global name, for messages.
        scale: float32, zero until frozen; empty when dynamic. A parameter once `learn_` was
            called, and then `frozen_tensors` has what is used and served of it.
        zero_point: int32, shaped like `scale`; None when symmetric or dynamic.
        global_scale: float32 (1,), zero until frozen; None without two levels.
        is_frozen: Calibrated: what is static is final.
        is_enabled: Off: `forward` is the identity (delayed fake quantization).
        observer: Present while observing (activations only).
        rule: How the scale is trained; None: it stays as calibrated.
        grad_scale: Factor on the scale's gradient.
        active_format: In use for now instead of the scheme's own, over the same range (bit annealing).
        reduce_amax: Of dynamic quantizers whose rows are cut over ranks: replaces maxima by those of all
            ranks. Handed in by the layer that knows the ranks.
    """

    scale: Tensor
    zero_point: Tensor | None
    global_scale: Tensor | None

    def __init__(self, scheme: TensorScheme, shape: tuple[int, ...] | None, name: str) -> None:
        super().__init__()
        self.scheme = scheme
        self.name = name
        self.is_frozen = False
        self.is_enabled = True
        self.observer: ActivationObserver | None = None
        self.rule: Rule | None = None
        self.grad_scale = 1.0
        self.active_format: QuantFormat | None = None
        self.reduce_amax: Callable[[Tensor], None] | None = None
        shapes = {"scale": (0,), "zero_point": None, "global_scale": None}
        for part, size in (shapes | scheme.frozen_shapes(shape)).items():
            dtype = torch.int32 if part == "zero_point" else torch.float32
            empty = None if size is None else torch.zeros(size, dtype=dtype)
            self.register_buffer(part, empty, persistent=False)

    @property
    def frozen_tensors(self) -> dict[str, Tensor]:
        """What calibration fixes and checkpoints hold: `scale`, `zero_point`, `global_scale`."""
        found: dict[str, Tensor] = {part: getattr(self, part) for part in self._parts}
        if self.rule is not None:
            found["scale"] = served_scale(self.scale.detach(), self.scheme.scale_dtype)
        return found

    @property
    def _parts(self) -> list[str]:
        return list(self.scheme.frozen_shapes(tuple(self.scale.shape)))

    @property
    def format(self) -> QuantFormat:
        """The active one, or the scheme's own."""
        return self.active_format or self.scheme.format

    def learn_(self, rule: Rule, grad_scale: float) -> nn.Parameter:
        """Makes the scale a parameter; call it before optimizer and DDP wrapper are built.

        Raises:
            UserError: The scheme's scale cannot be trained (`check_learnable`).
        """
        check_learnable(self.scheme, self.name)
        parameter = nn.Parameter(self.scale)
        del self.scale
        self.register_parameter("scale", parameter)
        self.rule, self.grad_scale = rule, grad_scale
        return parameter

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizer:
        """Scales move with the module but keep their dtype: `Float16Module` would cast them."""
        tensors = {**self._buffers, **self._parameters}
        held = {name: x.data for name, x in tensors.items() if x is not None}
        super()._apply(fn, recurse)
        for name, before in held.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:
                after.data = before.to(after.device)
        return self

    def _save_to_state_dict(self, *_: Any, **__: Any) -> None:
        """Nothing: a learned scale is no more part of the model's own keys than a frozen one."""

    def _load_from_state_dict(self, *_: Any, **__: Any) -> None:
        """Nothing, likewise."""

    def start_observing(self, method: str = "max") -> None:
        """Forgets the scale and collects statistics of what passes through, unchanged."""
        self.is_frozen = False
        self.observer = ActivationObserver(method).to(self.scale.device)

    def freeze_(self, statistic: Tensor, global_amax: Tensor | None = None) -> None:
        """Fixes what is static, by `frozen_qparams`; observing ends.

        From `qparams.statistic_of` (weights) or `ActivationObserver.calibrated`, merged over ranks.
        """
        self.load_(frozen_qparams(statistic, self.scheme, global_amax))

    def load_(self, tensors: Mapping[str, Tensor]) -> None:
        """Fixes the frozen tensors themselves, as chosen for a weight or read from a checkpoint.

        Raises:
            UserError: Other shapes than this quantizer's, or a scale that is not positive and finite.
        """
        for part in self._parts:
            self._check(part, tensors[part], tuple(getattr(self, part).shape))
        with torch.no_grad():
            for part in self._parts:
                getattr(self, part).copy_(tensors[part])
        self.observer = None
        self.is_frozen = True

    def _check(self, part: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
        if tuple(tensor.shape) != shape:
            raise UserError(
                f"{self.name}: {part} has shape {tuple(tensor.shape)}, expected {shape}."
            )
        if part == "zero_point":
            fmt = self.scheme.format
            if (
                tensor.numel()
                and not fmt.qmin <= int(tensor.min()) <= int(tensor.max()) <= fmt.qmax
            ):
                raise UserError(f"{self.name}: a zero point is not a code of {fmt.name}.")
            return
        # Waits for the device, once per calibration or load: a scale of zero or NaN trains silently.
        bad = ~((tensor > 0) & tensor.isfinite())
        if bool(bad.any()):
            raise UserError(
                f"{self.name}: {int(bad.sum())} of {tensor.numel()} {part}s are not positive finite "
                f"numbers (first: {float(tensor[bad][0])}). Calibrate again, or restore another "
                "checkpoint."
            )

    def reset(self) -> None:
        """Back to uncalibrated: `forward` is the identity again."""
        with torch.no_grad():
            for part in self._parts:
                getattr(self, part).zero_()
        self.observer = None
        self.is_frozen = False

    def qparams(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point for `x`: frozen or learned ones, or, when dynamic, its own."""
        if not self.scheme.is_dynamic:
            scale = self.scale
            if self.active_format is not None:
                scale = scale * (self.scheme.format.max_value / self.active_format.max_value)
            if self.rule is not None:
                scale = served_scale(scale, self.scheme.scale_dtype)
            return scale, self.zero_point
        statistic = statistic_of(x, self.scheme)
        if self.reduce_amax is not None:
            self.reduce_amax(statistic)
        return compute_qparams(statistic, self.scheme, self.global_scale)

    def forward(self, x: Tensor) -> Tensor:
        """Observes, fake-quantizes, or passes `x` through, according to the state."""
        if self.observer is not None:
            self.observer.observe_(x)
            return x
        if not (self.is_frozen and self.is_enabled):
            return x
        scale, zero_point = self.qparams(x)
        fmt, granularity = self.format, self.scheme.granularity
        if self.rule is not None:
            return fake_quantize_learned(
                x, scale, fmt, granularity, grad_scale=self.grad_scale, rule=self.rule
            )
        ste_clip_range = self.scheme.ste_clip_range if self.active_format is None else None
        return fake_quantize(
            x, scale, fmt, granularity, zero_point=zero_point, ste_clip_range=ste_clip_range
        )

"""Statistics of activations that merge exactly, in any order and over any number of ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mqat.quant.formats import QuantFormat
from mqat.quant.histogram import BINS, bin_of, entropy_amax, mse_amax, percentile_amax

METHODS = ("max", "percentile", "mse", "entropy")


class ActivationObserver(nn.Module):
    """Maximum, and for every method but `max` a histogram, of every tensor it is shown.

    Attributes:
        statistics: float32 (3,): largest |x| of the tensors that were finite throughout, 1 if
            anything was seen, 1 if anything was NaN or infinite (the first number then depends on
            how tokens were grouped, and `check` refuses it). Merged over ranks by MAX.
        histogram: int64 (32768,) counts of |x| (`quant/histogram.py`), unless `method` is `max`.
            Merged by SUM.
    """

    statistics: Tensor
    histogram: Tensor

    def __init__(self, method: str = "max") -> None:
        super().__init__()
        if method not in METHODS:
            raise ValueError(f"calibration method {method!r} is unknown; known: {METHODS}.")
        self.method = method
        self.register_buffer("statistics", torch.zeros(3), persistent=False)
        if method != "max":
            counts = torch.zeros(BINS, dtype=torch.int64)
            self.register_buffer("histogram", counts, persistent=False)

    @torch.no_grad()
    def observe_(self, x: Tensor) -> None:
        """Updates the statistics without waiting for the device; an empty tensor changes nothing."""
        if x.numel() == 0:
            return
        magnitude = x.detach().abs()
        largest = magnitude.amax().float()  # amax propagates NaN
        if self.method != "max":
            bins = bin_of(magnitude)
            # Not bincount: on CUDA it waits for the largest value, to size its result.
            one = torch.ones((), dtype=torch.int64, device=bins.device)
            self.histogram.index_add_(0, bins, one.expand(bins.shape))
        finite = largest.isfinite()
        seen = torch.ones_like(largest)
        update = torch.stack([torch.where(finite, largest, 0.0), seen, (~finite).float()])
        torch.maximum(self.statistics, update, out=self.statistics)

    def check(self, name: str) -> None:
        """Raises ValueError, naming the layer, if it saw nothing or saw NaN or infinity."""
        _, seen, nonfinite = self.statistics.tolist()
        if not seen:
            raise ValueError(
                f"{name}: no calibration token reached this layer, so its input has no scale. "
                "Check that the calibration batches run through the whole model."
            )
        if nonfinite:
            raise ValueError(
                f"{name}: input holds NaN or infinite values during calibration. Check the "
                "checkpoint and the calibration text, or calibrate in a wider precision."
            )

    def amax(self, percentile: float | None = None) -> Tensor:
        """The maximum, or a percentile of |x|; float32 (1,).

        Args:
            percentile: In (0, 100]; None is the true maximum. The result is the upper edge of the
                first bin at which the cumulative share reaches it, never above the maximum; it
                overestimates the exact percentile by at most 1/128 of it.

        Raises:
            ValueError: `percentile` is out of range, or no histogram was kept.
        """
        maximum = self.statistics[:1].clone()
        if percentile is None:
            return maximum
        if not 0 < percentile <= 100:
            raise ValueError(f"percentile={percentile} must be in (0, 100]; 100 is the maximum.")
        if self.method == "max":
            raise ValueError(
                f"percentile={percentile} needs a histogram, but this observer was made with "
                f"method={self.method!r}; start observing with method='percentile'."
            )
        return percentile_amax(self.histogram, maximum, percentile)

    def calibrated_amax(self, fmt: QuantFormat, percentile: float) -> Tensor:
        """What `method` chooses from the merged statistics, float32 (1,).

        Args:
            fmt: Format the input will have; `mse` and `entropy` depend on it.
            percentile: For the method of that name.
        """
        if self.method == "mse":
            return mse_amax(self.histogram, self.statistics[:1], fmt)
        if self.method == "entropy":
            return entropy_amax(self.histogram, self.statistics[:1], fmt)
        return self.amax(percentile if self.method == "percentile" else None)

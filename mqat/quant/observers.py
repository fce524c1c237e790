"""Statistics of activations that merge exactly, in any order and over any number of ranks."""

import torch
from torch import Tensor, nn

from mqat.errors import UserError
from mqat.quant.histogram import BINS, bin_of, entropy_amax, mse_amax, percentile_amax
from mqat.quant.scheme import TensorScheme

METHODS = ("max", "percentile", "mse", "entropy")


class ActivationObserver(nn.Module):
    """Maximum, and for every method but `max` a histogram, of every tensor it is shown.

    Attributes:
        statistics: float32 (4,): largest -x and largest x, at least 0, of the tensors that were finite
            throughout; 1 if anything was seen; 1 if anything was NaN or infinite (the first numbers
            then depend on how tokens were grouped, and `check` refuses them). Merged over ranks by MAX.
        histogram: int64 (32768,) counts of |x| (`quant/histogram.py`), unless `method` is `max`.
            Merged by SUM.
        tokens: Rows of the tensors it was shown, which is known without waiting for the device.
    """

    statistics: Tensor
    histogram: Tensor

    def __init__(self, method: str = "max") -> None:
        super().__init__()
        if method not in METHODS:
            raise UserError(f"calibration method {method!r} is unknown; known: {METHODS}.")
        self.method = method
        self.tokens = 0
        self.register_buffer("statistics", torch.zeros(4), persistent=False)
        if method != "max":
            counts = torch.zeros(BINS, dtype=torch.int64)
            self.register_buffer("histogram", counts, persistent=False)

    @torch.no_grad()
    def observe_(self, x: Tensor) -> None:
        """Updates the statistics without waiting for the device; an empty tensor changes nothing."""
        if x.numel() == 0:
            return
        self.tokens += len(x)
        low, high = x.detach().aminmax()  # both NaN if anything is
        ends = torch.stack([-low, high]).float()
        if self.method != "max":
            bins = bin_of(x.detach().abs())
            # Not bincount: on CUDA it waits for the largest value, to size its result.
            one = torch.ones((), dtype=torch.int64, device=bins.device)
            self.histogram.index_add_(0, bins, one.expand(bins.shape))
        finite = ends.isfinite().all()
        flags = torch.stack([torch.ones_like(finite), ~finite]).float()
        update = torch.cat([torch.where(finite, ends.clamp_min(0), 0.0), flags])
        torch.maximum(self.statistics, update, out=self.statistics)

    def check(self, name: str) -> None:
        """Raises UserError, naming the layer, if it saw nothing or saw NaN or infinity."""
        seen, nonfinite = self.statistics[2:].tolist()
        if not seen:
            raise UserError(
                f"{name}: no calibration token reached this layer, so its input has no scale. "
                "Check that the calibration batches run through the whole model."
            )
        if nonfinite:
            raise UserError(
                f"{name}: input holds NaN or infinite values during calibration. Check the "
                "checkpoint and the calibration text, or calibrate in a wider precision."
            )

    def amax(self, percentile: float | None = None) -> Tensor:
        """The maximum, or a percentile of |x| in (0, 100] (`histogram.percentile_amax`); float32 (1,).

        Raises:
            UserError: `percentile` is out of range, or no histogram was kept.
        """
        maximum = self.statistics[:2].amax().reshape(1)
        if percentile is None:
            return maximum
        if not 0 < percentile <= 100:
            raise UserError(f"percentile={percentile} must be in (0, 100]; 100 is the maximum.")
        if self.method == "max":
            raise UserError(
                f"percentile={percentile} needs a histogram, but this observer was made with "
                f"method={self.method!r}; start observing with method='percentile'."
            )
        return percentile_amax(self.histogram, maximum, percentile)

    def calibrated(self, scheme: TensorScheme, percentile: float) -> Tensor:
        """What `method` chooses from the merged statistics, for `Quantizer.freeze_`.

        A clipping point, float32 (1,). With a zero point (2, 1): largest -x and largest x, neither
        beyond the clipping point of symmetric codes.
        """
        if self.method == "mse":
            clip = mse_amax(self.histogram, self.amax(), scheme.format)
        elif self.method == "entropy":
            clip = entropy_amax(self.histogram, self.amax(), scheme.format)
        else:
            clip = self.amax(percentile if self.method == "percentile" else None)
        return torch.minimum(self.statistics[:2, None], clip) if scheme.is_asymmetric else clip

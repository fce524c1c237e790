"""A calibration recipe: which steps are taken before scales are frozen, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mqat.calibration.weights import METHODS
from mqat.errors import UserError

GRIDS = ("power_of_two", "float")
ROUNDINGS = ("nearest", "gptq")


@dataclass(frozen=True)
class Recipe:
    """How weights are prepared.

    Attributes:
        smoothquant: Rescale inputs where the tensor before can take up the factor (`pairs.py`).
        alpha: SmoothQuant's strength; None: searched for every linear (`search.py`).
        grid: `power_of_two` or `float` factors.
        fold_values: Also rescale the input of `linear_proj`, through the value rows.
        search_steps: Alphas tried between 0 and 1.
        weight_method: Clipping points, one of `weights.METHODS`.
        rounding: `nearest`, or `gptq`: weights are moved to grid points chosen together.
        layers_at_once: Layers calibrated in one pass; 0: all.
    """

    smoothquant: bool = False
    alpha: float | None = 0.8
    grid: str = "power_of_two"
    fold_values: bool = True
    search_steps: int = 10
    weight_method: str = "max"
    rounding: str = "nearest"
    layers_at_once: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for an unknown name or a number out of range."""
        for key, known in (("grid", GRIDS), ("weight_method", METHODS),
                           ("rounding", ROUNDINGS)):  # fmt: skip
            if getattr(self, key) not in known:
                raise UserError(f"{key}={getattr(self, key)!r} is unknown; known: {known}.")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise UserError(f"quantization.sq_alpha={self.alpha} must be in [0, 1], or null.")
        if self.search_steps < 1 or self.layers_at_once < 0:
            raise UserError("search_steps must be at least 1 and layers_at_once at least 0.")

    def including(self, algorithm: str | None) -> Recipe:
        """This recipe with the steps that an algorithm's name promises.

        `int8_sq`: SmoothQuant. `int4_awq`, `w4a8_awq`: AWQ's search of scales and of clipping points.
        """
        if algorithm == "int8_sq":
            return replace(self, smoothquant=True)
        if algorithm in ("int4_awq", "w4a8_awq"):
            method = "awq" if self.weight_method == "max" else self.weight_method
            return replace(self, smoothquant=True, alpha=None, grid="float", weight_method=method)
        return self

    @property
    def changes_anything(self) -> bool:
        """Whether there is anything to do beyond each weight's maximum."""
        return self.smoothquant or self.chooses_scales

    @property
    def chooses_scales(self) -> bool:
        """Whether weights get other clipping points than their maxima, or grid points of their own."""
        return self.weight_method != "max" or self.rounding != "nearest"

    @property
    def needs_input_hessian(self) -> bool:
        """Whether it looks at inputs."""
        return self.smoothquant or self.weight_method == "awq" or self.rounding == "gptq"

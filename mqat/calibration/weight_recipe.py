"""What happens to weights before scales are frozen: rescaled inputs, clipping points, rounding.

A recipe is carried out for all layers at once, or for a few layers at a time (`layers_at_once`): then
later layers are calibrated behind earlier ones that are already rescaled and rounded, memory for
statistics is bounded (`input_hessian.peak_bytes`), and the batches run once for every such block. Blocks
are cut by global layer number, so they are the same at any pipeline size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mqat.calibration.calibrate import exact_forward
from mqat.calibration.input_hessian import (
    InputHessian,
    check_input_hessians,
    collect_input_hessians,
)
from mqat.calibration.recipe import Recipe
from mqat.calibration.smoothing_pairs import find_smoothing_pairs, layer_number
from mqat.calibration.weight_calibrator import WeightCalibrator
from mqat.parallel.linear import decoder_linears
from mqat.parallel.quantized_module import quantized_modules
from mqat.runtime.groups import raise_on_any_rank


@torch.no_grad()
def apply_weight_recipe_(
    chunks: list[Any],
    run_batches: Callable[[], None],
    recipe: Recipe,
    *,
    num_layers: int,
    group: dist.ProcessGroup,
    dp_group: dist.ProcessGroup,
) -> dict[str, Tensor]:
    """Changes weights (and norms) in place as the recipe says, and chooses clipping points.

    Args:
        chunks: Model chunks of this rank, with quantized linears; not yet calibrated.
        run_batches: Runs the calibration forward passes (all ranks); called once per block.
        recipe: What to do.
        num_layers: Of the whole model, over all pipeline stages.
        group: TP x DP x CP of this pipeline stage.
        dp_group: DP x CP.

    Returns:
        What the weight quantizers of this rank are to freeze their scales from, by linear; absent where
        that is simply the weight's maximum.

    Raises:
        ValueError: On every rank: NaN or infinite values, a linear that no token reached, or a format
            that the weight method does not know.
    """
    linears = {n: x for n, x in decoder_linears(chunks).items() if x.quantizers}
    pairs = (
        find_smoothing_pairs(chunks, fold_values=recipe.fold_values) if recipe.smoothquant else {}
    )
    everything = quantized_modules(chunks)
    size = recipe.layers_at_once or num_layers
    found: dict[str, Tensor] = {}
    for start in range(0, num_layers, size):
        own = {n: x for n, x in linears.items() if start <= layer_number(n) < start + size}
        input_hessians: dict[str, InputHessian] = {}
        if recipe.needs_input_hessian:
            with exact_forward(everything):
                input_hessians = collect_input_hessians(
                    own, run_batches, group=group, dp_group=dp_group
                )
        error: Exception | None = None
        try:
            check_input_hessians(input_hessians)
        except ValueError as caught:
            error = caught
        raise_on_any_rank(error)
        block = WeightCalibrator(
            own, {n: s for n, s in pairs.items() if n in own}, input_hessians, recipe
        )
        if recipe.smoothquant:
            block.smoothquant_()
        if recipe.chooses_scales:
            try:
                block.choose_clipping_points()
                if recipe.rounding == "gptq":
                    block.round_()
            except ValueError as caught:
                error = caught
            raise_on_any_rank(error)
            found |= block.local_statistics()
    return found

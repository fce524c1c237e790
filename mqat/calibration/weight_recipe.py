"""What happens to weights before scales are frozen: rescaled inputs, chosen scales, rounding.

Recipes are carried out for all layers at once, or for a few layers at a time (`calib_layers_at_once`):
then later layers are calibrated behind earlier ones that are already rescaled and rounded, memory for
statistics is bounded (`input_hessian.py`), and the batches run once for every such span of
layers. Spans are cut by global layer number, so they are the same at any pipeline size.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mqat.calibration.calibrate import exact_forward
from mqat.calibration.check_recipes import check_recipes, needs_input_hessian, needs_inputs
from mqat.calibration.idle_experts import unreached
from mqat.calibration.input_hessian import (
    InputHessian,
    check_input_hessians,
    collect_input_hessians,
)
from mqat.calibration.rescale_inputs import rescale_inputs_
from mqat.calibration.smoothing_pairs import find_smoothing_pairs
from mqat.calibration.weight_calibrator import WeightCalibrator
from mqat.models.decoder import DecoderConfig
from mqat.models.structure import is_expert, is_in_layer, split_name
from mqat.parallel.linear import decoder_linears
from mqat.parallel.quantized_module import quantized_modules
from mqat.quant.algorithm import Recipe
from mqat.runtime.groups import gathered, on_all_ranks


@torch.no_grad()
def apply_weight_recipe_(
    chunks: list[Any],
    run_batches: Callable[[], None],
    recipes: Mapping[str, Recipe],
    *,
    model: DecoderConfig,
    group: dist.ProcessGroup,
    dp_group: dist.ProcessGroup,
    calib_layers_at_once: int = 0,
) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Changes weights (and norms) in place as their recipes say, and chooses their scales.

    Args:
        chunks: Model chunks of this rank, with quantized linears; not yet calibrated.
        run_batches: Runs the calibration forward passes (all ranks); called once per span of layers.
        recipes: Global name of a linear -> what to do, of the whole model; the same on every rank.
            Names without one, and vocabulary tables, are left alone.
        model: Whose table says what is before a linear.
        group: TP x DP x CP of this pipeline stage.
        dp_group: DP x CP.
        calib_layers_at_once: Layers of a span; 0: all.

    Returns:
        The tensors that the weight quantizers of this rank are to freeze (`TensorScheme.frozen_shapes`),
        by linear; absent where they are simply those of the weight's maxima. And the global names of
        experts' linears whose inputs a recipe wanted to see and that no or hardly any token reached
        (`idle_experts.py`), on every rank: their weights are rounded to nearest, on the grids of their
        maxima, and an input of their own is not rescaled.

    Raises:
        UserError: On every rank: NaN or infinite values, a linear that no token reached, where that is
            not one of several experts, a format that the clipping method does not know, or an input
            that cannot be rescaled.
    """
    recipes = {name: recipe for name, recipe in recipes.items() if is_in_layer(name)}
    linears = {n: x for n, x in decoder_linears(chunks).items() if x.quantizers and n in recipes}
    weights = {
        n: x.quantizers["weight"].scheme for n, x in linears.items() if "weight" in x.quantizers
    }
    with on_all_ranks():
        check_recipes(recipes, dict.fromkeys(linears) | weights, model)
    everything = quantized_modules(chunks)
    size = calib_layers_at_once or model.num_layers
    found: dict[str, dict[str, Tensor]] = {}
    idle: set[str] = set()
    for start in range(0, model.num_layers, size):
        span = {n: r for n, r in recipes.items() if start <= split_name(n)[0] < start + size}
        own = {name: linear for name, linear in linears.items() if name in span}
        watched = {name for name, recipe in span.items() if needs_inputs(recipe)}
        input_hessians: dict[str, InputHessian] = {}
        if watched:  # on any stage: they run the batches together
            with exact_forward(everything):
                input_hessians = collect_input_hessians(
                    {name: linear for name, linear in own.items() if name in watched},
                    run_batches,
                    group=group,
                    dp_group=dp_group,
                    matrices={name for name in watched if needs_input_hessian(span[name])},
                )
        of_experts = {n: int(h.tokens) for n, h in input_hessians.items() if is_expert(n)}
        without = unreached(everything, of_experts)
        for name in without:
            input_hessians[name].forget_()
        idle |= without
        with on_all_ranks():
            check_input_hessians(input_hessians, without)
            smoothed = {name for name in own if span[name].smoothquant}
            pairs = find_smoothing_pairs(chunks, smoothed, model)
        experts = {n: x for n, x in own.items() if x.expert_groups is not None}
        dense = {n: x for n, x in own.items() if n not in experts}
        for part in (dense, experts):  # each among ranks of its own
            of_part = {n: p for n, p in pairs.items() if part.keys() & p.linears.keys()}
            scales = rescale_inputs_(of_part, span, input_hessians)
            calibrator = WeightCalibrator(part, span, scales, input_hessians)
            with on_all_ranks():
                calibrator.choose_scales()
                calibrator.round_()
            found |= calibrator.local_qparams()
    return found, sorted({name for names in gathered(sorted(idle)) for name in names})

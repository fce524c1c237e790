"""SmoothQuant and AWQ: chooses the factors of inputs' channels, and folds them into what is before.

A pair's linears share its factors. Behind the norm of a mixture they are the experts of a layer, of
which this rank has some: maxima are then those of all experts, and what is searched has the least
output error of all experts together, each with its own tokens and its own scale of the input. An expert
that no token reached adds nothing; its second linear, whose input nobody saw, keeps its channels.
A router reads the same norm: factors of such a pair are powers of two whatever the recipe's grid, so
that its scores keep their bits and no token goes to other experts.

Sums over experts are made in the order of their numbers, on every rank alike, from tensors with a slot
for each expert that other ranks leave zero. Legend: `I` input features, `C` candidates, `E` experts.
"""

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from mqat.calibration.input_hessian import InputHessian
from mqat.calibration.scale_search import (
    InputStatistics,
    best_candidate,
    candidate_scales,
    shard_losses,
)
from mqat.calibration.smoothing_pairs import SmoothingPair
from mqat.calibration.smoothquant import round_scale, smoothquant_scale
from mqat.calibration.tp_invariant_shards import of_all_shards, row_shards
from mqat.parallel.reduce import all_reduce_fused_
from mqat.quant.algorithm import Recipe
from mqat.quant.scales import divide


def rescale_inputs_(
    pairs: Mapping[str, SmoothingPair],
    recipes: Mapping[str, Recipe],
    input_hessians: Mapping[str, InputHessian],
) -> dict[str, Tensor]:
    """Rescales the input of every pair; a collective.

    Args:
        pairs: Either all of experts or none; the same on all tensor-parallel ranks.
        recipes: Of their linears, by name; those of one pair rescale alike.
        input_hessians: Merged statistics of their inputs, with XᵀX where a recipe searches.

    Returns:
        The factors, float32 [I], by linear.
    """
    if not pairs:
        return {}
    found: dict[str, Tensor] = {}
    inputs, weights = _input_amax(pairs, input_hessians), _column_amax(pairs)
    seen = {n: p for n, p in pairs.items() if _has_tokens(p, input_hessians)}
    recipe_of = {name: recipes[next(iter(pair.linears))] for name, pair in pairs.items()}
    searched = {n: p for n, p in seen.items() if recipe_of[n].sq_alpha is None}
    scales = _searched(searched, recipe_of, input_hessians, inputs, weights)
    for name, pair in pairs.items():
        alpha, grid = recipe_of[name].sq_alpha, _grid(pair, recipe_of[name])
        if name not in seen:
            scales[name] = torch.ones_like(inputs[name])
        elif alpha is not None:
            x, w = pair.tied(inputs[name]), pair.tied(weights[name])
            scales[name] = round_scale(smoothquant_scale(x, w, alpha), grid)
        pair.fold_(scales[name])
        found |= dict.fromkeys(pair.linears, scales[name])
    return found


def _grid(pair: SmoothingPair, recipe: Recipe) -> str:
    return recipe.sq_grid if pair.router is None else "power_of_two"


def _has_tokens(pair: SmoothingPair, input_hessians: Mapping[str, InputHessian]) -> bool:
    """Whether a token reached its linears; some of a layer's experts were reached, on any rank."""
    is_shared = pair.expert_ranks is not None
    return is_shared or any(int(input_hessians[name].tokens) for name in pair.linears)


def _merge(
    pairs: Mapping[str, SmoothingPair],
    values: Mapping[str, Tensor],
    op: dist.ReduceOp.RedOpType,
    *,
    over_tp: bool,
) -> None:
    """In place, by pair: over TP, and over the ranks whose experts share what is merged."""
    if over_tp and values:
        all_reduce_fused_(list(values.values()), op, next(iter(pairs.values())).linear.tp_group)
    shared = {name: value for name, value in values.items() if pairs[name].expert_ranks is not None}
    for name in list(shared)[:1]:  # one group for all
        all_reduce_fused_(list(shared.values()), op, pairs[name].expert_ranks)


def _input_amax(
    pairs: Mapping[str, SmoothingPair], input_hessians: Mapping[str, InputHessian]
) -> dict[str, Tensor]:
    """Largest |x_j|, float32 [I], by pair."""
    found = {
        name: torch.stack([input_hessians[n].amax for n in pair.linears]).amax(dim=0)
        for name, pair in pairs.items()
    }
    _merge(pairs, found, dist.ReduceOp.MAX, over_tp=False)
    return found


def _column_amax(pairs: Mapping[str, SmoothingPair]) -> dict[str, Tensor]:
    """Largest |W_oj| of each input channel j, float32 [I], by pair."""
    found = {}
    for name, pair in pairs.items():
        shards = [shard for linear in pair.linears.values() for shard in row_shards(linear)]
        found[name] = torch.stack([shard.abs().amax(dim=0) for shard in shards]).amax(dim=0)
    _merge(pairs, found, dist.ReduceOp.MAX, over_tp=True)
    return found


def _summed(
    pairs: Mapping[str, SmoothingPair], of_linear: Callable[[str], Tensor]
) -> dict[str, Tensor]:
    """Sums over the linears of each pair in the order of experts' numbers, on every rank."""
    slots = {}
    for name, pair in pairs.items():
        own = torch.stack([of_linear(linear) for linear in pair.linears])
        ranks = pair.expert_ranks
        count, rank = (1, 0) if ranks is None else (ranks.size(), ranks.rank())
        slots[name] = own.new_zeros(count * len(own), *own.shape[1:])
        slots[name][rank * len(own) : (rank + 1) * len(own)] = own
    _merge(pairs, slots, dist.ReduceOp.SUM, over_tp=False)
    found = {}
    for name, terms in slots.items():
        total = torch.zeros_like(terms[0])
        for term in terms:
            total = total + term
        found[name] = total
    return found


def _searched(
    pairs: Mapping[str, SmoothingPair],
    recipes: Mapping[str, Recipe],
    input_hessians: Mapping[str, InputHessian],
    inputs: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The best of many factors, by pair."""
    linears = {name: linear for pair in pairs.values() for name, linear in pair.linears.items()}
    squares = {name: input_hessians[name].diagonal(linears[name]) for name in linears}
    squares = _summed(pairs, squares.__getitem__)
    tokens = _summed(pairs, lambda name: input_hessians[name].tokens.double())
    candidates, losses = dict[str, Tensor](), dict[str, Tensor]()
    for name, pair in pairs.items():
        rms = divide(squares[name], float(tokens[name])).sqrt().float()
        maxima = (pair.tied(values) for values in (inputs[name], weights[name], rms))
        recipe = recipes[name]
        candidates[name] = candidate_scales(
            *maxima, search_steps=recipe.search_steps, sq_grid=_grid(pair, recipe)
        )
        for linear_name, linear in pair.linears.items():
            seen = input_hessians[linear_name]
            statistics = InputStatistics(seen.matrix(linear), seen.amax, int(seen.tokens))
            schemes = {kind: quantizer.scheme for kind, quantizer in linear.quantizers.items()}
            losses[linear_name] = shard_losses(
                row_shards(linear), statistics, candidates[name], schemes.get("weight"),
                schemes.get("input"),
            )  # fmt: skip
    losses = of_all_shards(linears, losses)
    total = _summed(pairs, losses.__getitem__)
    return {name: candidates[name][best_candidate(total[name])] for name in pairs}

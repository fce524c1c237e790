"""What recipes cannot do with a scheme or a model is refused before any process group exists."""

from collections.abc import Mapping, Sequence
from typing import Any

from mqat.calibration.clipping_methods import CLIPPING_METHODS
from mqat.errors import UserError
from mqat.models.decoder import DecoderConfig
from mqat.models.experts import in_mixture
from mqat.models.structure import Linear, in_layer, split_name
from mqat.quant.algorithm import Recipe
from mqat.quant.granularity import PerBlock
from mqat.quant.scheme import TensorScheme


def needs_inputs(recipe: Recipe) -> bool:
    """Whether a recipe looks at inputs."""
    return recipe.smoothquant or needs_input_hessian(recipe)


def needs_input_hessian(recipe: Recipe) -> bool:
    """Whether a recipe looks at more of inputs than their maxima."""
    method = CLIPPING_METHODS.get(recipe.weight_calibrator)
    looks = method is not None and method.needs_input_hessian
    searches = recipe.smoothquant and recipe.sq_alpha is None
    return searches or recipe.rounding == "gptq" or looks


def check_recipes(
    recipes: Mapping[str, Recipe],
    weights: Mapping[str, TensorScheme | None],
    model: DecoderConfig,
) -> None:
    """Checks linears one by one.

    Args:
        recipes: By global name of a linear; of the whole model, without those that are not quantized.
        weights: Schemes of those to check; None: the weight is not quantized.
        model: Whose table says what feeds a linear.

    Raises:
        UserError: Names the first linear, its recipe, and what would work.
    """
    readers: dict[Any, list[Linear]] = {}  # by kind of layer and what feeds them
    layers = {model.has_experts(layer): layer for layer in range(model.num_layers)}
    for has_experts, layer in layers.items():
        for linear in model.linears_of(layer):
            readers.setdefault((has_experts, linear.norm, linear.fed_by), []).append(linear)
    for name, scheme in weights.items():
        recipe = recipes[name]
        if recipe.smoothquant:
            layer, own = split_name(name)
            linear = model.linear(own)
            found = readers[(model.has_experts(layer), linear.norm, linear.fed_by)]
            _check_readers(name, linear, found, recipes, model)
        if scheme is None or not recipe.chooses_scales:
            continue
        if isinstance(scheme.granularity, PerBlock):
            raise UserError(
                f"{name}: weights in squares ({scheme.granularity}) span the shards that are worked on; "
                "keep weight_calibrator=max and rounding=nearest for them."
            )
        if recipe.weight_calibrator in CLIPPING_METHODS:
            CLIPPING_METHODS[recipe.weight_calibrator].check(name, scheme)


def _check_readers(
    name: str,
    linear: Linear,
    readers: Sequence[Linear],
    recipes: Mapping[str, Recipe],
    model: DecoderConfig,
) -> None:
    """Refuses an input that cannot be rescaled for all who read it."""
    if linear.norm is None and linear.fed_by is None:
        raise UserError(
            f"{name}: its input comes from an activation, which no tensor before it can rescale in a "
            f"{model.family} model; switch smoothquant off for it by a rule with pattern "
            f"'*.{linear.name}' (recipe: {{smoothquant: false}})."
        )
    if linear.expert is not None:  # all as the first, and the first as all
        _check_alike(name, readers if linear == readers[0] else readers[:1], recipes)
    for other in readers:
        if other != linear and None in (linear.expert, other.expert):
            is_of_mixture = in_mixture(linear) and in_mixture(other)
            pattern = f"*.mlp.*experts.*{linear.kind}" if is_of_mixture else f"*.{linear.name}"
            raise UserError(
                f"{name}: its input also feeds {other.name}, so it cannot be rescaled for one of them "
                "alone; switch smoothquant off for all that read it by a rule with pattern "
                f"'{pattern}', an algorithm, and recipe: {{smoothquant: false}}."
            )


def _check_alike(name: str, others: Sequence[Linear], recipes: Mapping[str, Recipe]) -> None:
    """Refuses experts of a layer that rescale their one input each in its own way."""
    layer, keys = split_name(name)[0], ("smoothquant", "sq_alpha", "sq_grid", "search_steps")
    for other in others:
        recipe = recipes.get(in_layer(layer, other.name))
        apart = [k for k in keys if getattr(recipe, k, None) != getattr(recipes[name], k)]
        if apart:
            raise UserError(
                f"{name}: smoothquant rescales the one input of all experts of a layer, but "
                f"{in_layer(layer, other.name)} {'is not quantized' if recipe is None else 'differs'} "
                f"({', '.join(apart)}). Give all experts of a layer one rule, such as pattern "
                "'*.mlp.experts.*', or switch smoothquant off for them (recipe: {smoothquant: false})."
            )

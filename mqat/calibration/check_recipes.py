"""What recipes cannot do with a scheme or a model is refused before any process group exists."""

from collections.abc import Mapping

from mqat.calibration.clipping_methods import CLIPPING_METHODS
from mqat.errors import UserError
from mqat.models.decoder import DecoderConfig
from mqat.models.structure import split_name
from mqat.quant.algorithm import Recipe
from mqat.quant.granularity import PerBlock
from mqat.quant.scheme import TensorScheme


def needs_input_hessian(recipe: Recipe) -> bool:
    """Whether a recipe looks at inputs."""
    method = CLIPPING_METHODS.get(recipe.weight_calibrator)
    looks = method is not None and method.needs_input_hessian
    return recipe.smoothquant or recipe.rounding == "gptq" or looks


def check_recipes(
    recipes: Mapping[str, Recipe],
    weights: Mapping[str, TensorScheme | None],
    model: DecoderConfig,
) -> None:
    """Checks linears one by one.

    Args:
        recipes: By global name of a linear.
        weights: Schemes of those to check; None: the weight is not quantized.
        model: Whose table says what feeds a linear.

    Raises:
        UserError: Names the first linear, its recipe, and what would work.
    """
    for name, scheme in weights.items():
        recipe = recipes[name]
        if needs_input_hessian(recipe) and model.linear(split_name(name)[1]).expert is not None:
            raise UserError(
                f"{name}: smoothquant, weight_calibrator=awq and rounding=gptq look at all inputs of a "
                "linear, which is not done for experts, each of which sees some tokens only. Give them "
                "an algorithm without a recipe (int4, nvfp4, fp8, int8) by a rule with pattern "
                "'*.mlp.experts.*', and weight_calibrator=mse if their scales are to be searched."
            )
        if recipe.smoothquant:
            _check_single_reader(name, model)
        if scheme is None or not recipe.chooses_scales:
            continue
        if isinstance(scheme.granularity, PerBlock):
            raise UserError(
                f"{name}: weights in squares ({scheme.granularity}) span the shards that are worked on; "
                "keep weight_calibrator=max and rounding=nearest for them."
            )
        if recipe.weight_calibrator in CLIPPING_METHODS:
            CLIPPING_METHODS[recipe.weight_calibrator].check(name, scheme)


def _check_single_reader(name: str, model: DecoderConfig) -> None:
    layer, own = split_name(name)
    linear = model.linear(own)
    if linear.norm is None and linear.fed_by is None:
        raise UserError(
            f"{name}: its input comes from an activation, which no tensor before it can rescale in a "
            f"{model.family} model; switch smoothquant off for it by a rule with pattern "
            f"'*.{linear.name}' (recipe: {{smoothquant: false}})."
        )
    for other in model.linears_of(layer):
        shares = (other.norm, other.fed_by) == (linear.norm, linear.fed_by)
        if shares and other.name != linear.name:
            raise UserError(
                f"{name}: its input also feeds {other.name}, so it cannot be rescaled for one of them "
                "alone; switch smoothquant off for it by a rule (recipe: {smoothquant: false})."
            )

"""What a run quantizes by its algorithm and rules; refused is what would not be honoured."""

from collections.abc import Mapping
from dataclasses import asdict

from mqat.calibration.check_recipes import check_recipes
from mqat.config import QuantizationConfig, RuleConfig, RunConfig
from mqat.errors import UserError
from mqat.models.decoder import DecoderConfig
from mqat.models.schemes import Scheme, linear_schemes
from mqat.parallel.backward_formats import check_backward
from mqat.plan.bit_schedule import check_bits
from mqat.quant.algorithm import Recipe, takes_group_size
from mqat.quant.learned import check_learnable
from mqat.quant.scheme import LinearScheme
from mqat.specs.policy import Policy, Rule


def quantized_layers(
    config: RunConfig, model: DecoderConfig
) -> tuple[dict[str, Scheme], dict[str, Recipe]]:
    """Schemes of linears, tables and caches, and recipes of weights, by global name.

    Unquantized training (`mqat sft`) has none, whatever `quantization` says, so that a run may share the
    file of the quantized one that follows it.

    Raises:
        UserError: An unknown algorithm, a key without effect, scales or bits that cannot change as
            configured, or a recipe that does not fit.
    """
    settings = config.quantization
    _check_group_size(settings)
    policy = Policy(
        settings.algorithm or "null",
        settings.group_size,
        tuple(map(_rule, settings.rules)),
        settings.kv_cache,
        settings.kv_cache_scales,
        tuple(settings.disabled),
        settings.recipe,
    )
    algorithms = policy.resolve(model)
    if config.command == "sft":
        return {}, {}
    layers: dict[str, Scheme] = {name: a.scheme for name, a in algorithms.items()}
    layers |= policy.cache_schemes(model)
    linears = linear_schemes(layers)
    _check_training(settings, linears)
    recipes = {name: algorithm.recipe for name, algorithm in algorithms.items()}
    check_recipes(recipes, {name: scheme.weight for name, scheme in linears.items()}, model)
    return layers, recipes


def _rule(config: RuleConfig) -> Rule:
    given = {"weight": config.weight, "input": config.input, "output": config.output}
    operands = {kind: asdict(operand) for kind, operand in given.items() if operand is not None}
    return Rule(config.pattern, config.algorithm, operands, config.recipe)


def _check_group_size(settings: QuantizationConfig) -> None:
    names = [settings.algorithm or "null", *(rule.algorithm or "null" for rule in settings.rules)]
    is_ignored = settings.group_size is not None and not any(map(takes_group_size, names))
    if is_ignored and (settings.rules or names != ["null"]):
        raise UserError(
            f"config: quantization.group_size={settings.group_size} has no effect: the weights of "
            f"{', '.join(dict.fromkeys(names))} are not groups of integers of a free size. "
            "Leave it out, choose an algorithm such as int4, or give a rule granularity 'group:<size>'."
        )


def _check_training(settings: QuantizationConfig, layers: Mapping[str, LinearScheme]) -> None:
    """Refuses schemes whose scales or bits cannot change during training as configured."""
    rules = {"weight": settings.weight_rule, "input": settings.input_rule}
    for kind, rule in rules.items():
        operands = {n: s.operands[kind] for n, s in layers.items() if kind in s.operands}
        if rule is None:
            continue
        if not operands:
            raise UserError(
                f"config: quantization.{kind}_scales={rule}, but no {kind} is quantized; set it to "
                "frozen, or choose another algorithm."
            )
        for name, operand in operands.items():
            try:
                check_learnable(operand, f"{name}.{kind}")
            except ValueError as error:
                raise UserError(f"config: quantization.{kind}_scales={rule}: {error}") from error
    check_bits(settings.bit_schedule, layers)
    if settings.backward == "bf16":
        return
    for key in ("weight_scales", "input_scales", "bit_schedule"):
        value = getattr(settings, key)
        if value not in ("frozen", []):
            raise UserError(
                f"config: quantization.backward={settings.backward} goes with frozen scales and bits, "
                f"not with quantization.{key}={value}; leave one of them out."
            )
    try:
        check_backward(settings.backward, layers)
    except ValueError as error:
        raise UserError(f"config: quantization.{error}") from error

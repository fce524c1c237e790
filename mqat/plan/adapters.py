"""Which linears get an adapter, by `model.peft`; refused is what would not be honoured."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from mqat.checkpoints.manifest import read_description
from mqat.config import ModelConfig, RunConfig
from mqat.errors import UserError
from mqat.models.adapters import Adapters
from mqat.models.decoder import DecoderConfig
from mqat.models.schemes import Scheme, linear_schemes
from mqat.models.structure import in_layer, is_expert, split_name
from mqat.plan.origin import Origin
from mqat.quant.algorithm import Recipe

_KEY = "config: model.peft.lora_tuning.target_modules"


def read_adapters(
    config: RunConfig, model: DecoderConfig, layers: Mapping[str, Scheme]
) -> Adapters | None:
    """Adapters of a run; None: everything is trained.

    Args:
        config: Of the run.
        model: Its sizes.
        layers: Global name -> scheme, of what is quantized.

    Raises:
        UserError: A pattern matches nothing or an expert, a pipeline stage would have nothing to train,
            or a key goes with training of the weights or their scales.
    """
    peft = config.model.peft
    if peft is None:
        return None
    names = _matching(peft.lora_tuning.target_modules, model)
    _check_stages(config, model, names)
    _check_other_keys(config)
    schemes = linear_schemes(layers)
    for name in names:
        if name in schemes and schemes[name].output is not None:
            raise UserError(
                f"{_KEY}: the output of {name} is quantized, and an adapter would be added to that; "
                "leave one of them out (quantization.disabled takes *.output)."
            )
    if peft.merge:
        tables = [name for name in layers if name in schemes and name not in names]
        if layers and not set(names) & schemes.keys():
            raise UserError(
                f"{_KEY}: merge: true quantizes W + B A, but none of the {len(tables)} quantized "
                f"linears ({tables[0]}, ...) has an adapter; add patterns for them, or set it to false."
            )
    lora = peft.lora_tuning
    alpha = float(lora.adapter_dim if lora.alpha is None else lora.alpha)
    return Adapters(tuple(names), lora.adapter_dim, alpha, lora.adapter_dropout, peft.merge)


def _matching(patterns: list[str], model: DecoderConfig) -> list[str]:
    names = [in_layer(i, x.name) for i in range(model.num_layers) for x in model.linears_of(i)]
    found = set()
    for pattern in patterns:
        own = {n for n in names if any(fnmatchcase(x, pattern) for x in (n, n.rpartition(".")[2]))}
        if not own:
            kinds = dict.fromkeys(name.rpartition(".")[2] for name in names)
            raise UserError(
                f"{_KEY}: pattern {pattern!r} matches no linear. Linears are {', '.join(kinds)}; whole "
                f"names look like {names[0]!r}."
            )
        experts = sorted(name for name in own if is_expert(name))
        if experts:
            raise UserError(
                f"{_KEY}: pattern {pattern!r} matches {experts[0]}; linears of experts have no "
                "adapters. Use patterns of attention alone."
            )
        found |= own
    return [name for name in names if name in found]


def _check_stages(config: RunConfig, model: DecoderConfig, names: list[str]) -> None:
    settings = config.model
    stages = settings.pipeline_model_parallel_size
    stages *= settings.virtual_pipeline_model_parallel_size or 1
    per_stage = model.num_layers // stages
    trained = {split_name(name)[0] // per_stage for name in names}
    missing = sorted(set(range(stages)) - trained)
    if missing:
        first = missing[0] * per_stage
        raise UserError(
            f"{_KEY}: no linear of layers {first} to {first + per_stage - 1} has an adapter, so one of "
            f"{stages} pipeline chunks would have nothing to train; add patterns, or use fewer stages."
        )


def _check_other_keys(config: RunConfig) -> None:
    quantization = config.quantization
    refused = {
        "model.pretrain.max_steps": (
            config.model.pretrain.max_steps,
            "trains all weights: do that in a run before (mqat sft), and name its checkpoint in "
            "model.restore_from_path",
        ),
        "model.moe_router_bias_update_rate": (
            config.model.moe_router_bias_update_rate,
            "moves a router, which is frozen; leave it out",
        ),
        "model.megatron.defer_embedding_wgrad_compute": (
            config.model.megatron.get("defer_embedding_wgrad_compute"),
            "defers a gradient that a frozen output layer does not have; leave it out",
        ),
        "model.ddp.overlap_param_gather": (
            config.model.peft is not None
            and config.model.peft.merge
            and config.model.ddp.get("overlap_param_gather"),
            "Megatron gathers adapters when they are called, which merged ones are not; leave it out, "
            "or set model.peft.merge to false",
        ),
        "quantization.weight_scales": (
            quantization.weight_rule,
            "trains scales, but only adapters are trained; set it to frozen",
        ),
        "quantization.input_scales": (
            quantization.input_rule,
            "trains scales, but only adapters are trained; set it to frozen",
        ),
        "quantization.bit_schedule": (
            quantization.bit_schedule,
            "changes the bits of weights that are frozen; leave it out",
        ),
    }
    for key, (value, why) in refused.items():
        if value:
            raise UserError(f"config: {key}={value} with model.peft: {why}.")


def check_start(
    config: RunConfig, layers: Mapping[str, Scheme], recipes: Mapping[str, Recipe], source: Origin
) -> None:
    """Refuses to calibrate under adapters that are trained already: calibration runs the weights alone.

    Raises:
        UserError: The run starts from a checkpoint with adapters, and needs more than maxima of weights.
    """
    if not (isinstance(source, Path) and source.exists()) or config.quantization.compress:
        return
    if read_description(source).get("adapters") is None:
        return
    peft = config.model.peft
    needs = [name for name, scheme in layers.items() if scheme.operands.keys() - {"weight"}]
    needs += [name for name, recipe in recipes.items() if recipe.changes_anything]
    if layers and (needs or (peft is not None and peft.merge)):
        what = (
            f"{needs[0]} is calibrated with data" if needs else "W + B A is quantized (merge: true)"
        )
        raise UserError(
            f"config: model.restore_from_path={source}: has trained adapters, but {what}, and "
            "calibration runs the weights alone. Put them into the weights first: mqat export --format "
            "peft, then mqat import of that with --base; or name the checkpoint they were trained on."
        )


def rank_adapters(model: DecoderConfig, settings: ModelConfig, adapters: Adapters) -> float:
    """Elements of adapters on the fullest rank, of which A or B is whole on every rank."""
    tp, pp = settings.tensor_model_parallel_size, settings.pipeline_model_parallel_size
    stages = [0.0] * pp
    for name in adapters.names:
        layer, short = split_name(name)
        linear = model.linear(short)
        rows, columns = linear.shape(model)
        cut, whole = (rows, columns) if linear.parallel == "column" else (columns, rows)
        stages[layer * pp // model.num_layers] += adapters.rank * (cut / tp + whole)
    return max(stages)

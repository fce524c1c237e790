"""What `quantization.compress` goes with: weights that are packed as they are loaded, under adapters."""

from collections.abc import Mapping
from pathlib import Path

from mqat.checkpoints.manifest import read_description
from mqat.config import ModelConfig, RunConfig
from mqat.errors import UserError
from mqat.kernels.frozen_codes import check_packable, is_double_nf4
from mqat.kernels.packed_nf4 import SCALE_BLOCK
from mqat.models.decoder import DecoderConfig
from mqat.models.schemes import Scheme, linear_schemes
from mqat.models.structure import is_expert, split_name
from mqat.plan.origin import Origin
from mqat.quant.algorithm import Recipe
from mqat.quant.granularity import PerGroup
from mqat.quant.scheme import LinearScheme

_KEY = "config: quantization.compress=true"


def check_compressed(
    config: RunConfig,
    model: DecoderConfig,
    layers: Mapping[str, Scheme],
    recipes: Mapping[str, Recipe],
    source: Origin,
) -> None:
    """Refuses packed weights that could not be made, or would be trained.

    Raises:
        UserError: Names the key or the linear.
    """
    if not config.quantization.compress:
        return
    peft, linears = config.model.peft, linear_schemes(layers)
    if peft is None or peft.merge:
        raise UserError(
            f"{_KEY}: packed weights cannot be trained, nor can anything be merged into them; set "
            "model.peft.peft_scheme=lora and model.peft.merge=false, or leave it out."
        )
    if not linears:
        raise UserError(f"{_KEY}: nothing is quantized; set quantization.algorithm, such as nf4.")
    _check_keys(config)
    others = sorted(layers.keys() - linears.keys())
    if others:
        raise UserError(
            f"{_KEY}: {others[0]} is quantized too, which is not packed; leave it unquantized."
        )
    for name, scheme in linears.items():
        if is_expert(name):
            raise UserError(f"{_KEY}: {name} is an expert's; experts are not packed.")
        if scheme.weight is None:
            raise UserError(f"{_KEY}: the weight of {name} is not quantized.")
        check_packable(name, scheme.weight)
        if is_double_nf4(scheme.weight) and recipes[name].chooses_scales:
            raise UserError(f"{_KEY}: {name}: NF4 has its blocks' maxima; leave out the recipe.")
        columns = model.linear_shape(split_name(name)[1])[1]
        size = scheme.weight.granularity
        assert isinstance(size, PerGroup), "check_packable()"
        if columns % size.size:
            raise UserError(
                f"{_KEY}: groups of {size.size} do not divide the {columns} input features of {name}; "
                "set quantization.group_size, or choose nf4, whose blocks are of 64."
            )
    for kind in {split_name(name)[1] for name in linears}:
        count = sum(split_name(name)[1] == kind for name in linears)
        if count != model.num_layers:
            raise UserError(
                f"{_KEY}: {kind} is quantized in {count} of {model.num_layers} layers, but is packed in "
                "all or none; change the patterns of quantization.rules."
            )
    _check_scales(layers, recipes, source)


def _check_keys(config: RunConfig) -> None:
    quantization = config.quantization
    refused = {
        "quantization.compare_with_finetuned": (
            quantization.compare_with_finetuned,
            "there is no unquantized model to fine-tune; set it to false, and run the same adapters "
            "with quantization.algorithm=null beside",
        ),
        "quantization.fake_quant_after_n_steps": (
            quantization.fake_quant_after_n_steps,
            "weights are packed from the first step; leave it out",
        ),
        "exp_manager.quality_report": (
            config.exp_manager.quality_report,
            "there are no unquantized weights to compare with; leave it out",
        ),
        "export.format": (
            config.export.format not in (None, "peft") and config.export.format,
            "adapters alone are exported: set it to peft. Export the base from the calibrated "
            "checkpoint that was packed",
        ),
        "quantization.distill.teacher": (
            quantization.distill is not None and quantization.distill.teacher is None and "null",
            "the weights of the start are packed; name the unquantized model",
        ),
    }
    for key, (value, why) in refused.items():
        if value:
            raise UserError(f"config: {key}={value} with quantization.compress: {why}.")


def _check_scales(
    layers: Mapping[str, Scheme], recipes: Mapping[str, Recipe], source: Origin
) -> None:
    """Recipes and inputs need passes of the unquantized model, which calibrated checkpoints had."""
    # Where only a model's sizes are known (`plan.sizes`), its name stands for unquantized weights.
    checkpoint = source if isinstance(source, Path) and source.exists() else None
    if checkpoint is not None and read_description(checkpoint)["quantization"] is not None:
        return
    for name, scheme in linear_schemes(layers).items():
        recipe = recipes[name]
        if len(scheme.operands) > 1 or recipe.changes_anything:
            kind = "a recipe" if recipe.changes_anything else "scales of inputs"
            raise UserError(
                f"{_KEY}: {name} needs {kind} ({scheme.name}), for which the unquantized model has to "
                "run. Calibrate first (mqat ptq), and name that checkpoint in model.restore_from_path."
            )


def packed_savings(
    model: DecoderConfig, settings: ModelConfig, schemes: Mapping[str, LinearScheme], width: int
) -> float:
    """Bytes that packed weights take less than those of `width` bytes an element, on a rank."""
    saved = 0.0
    for name, scheme in schemes.items():
        rows, columns = model.linear_shape(split_name(name)[1])
        assert scheme.weight is not None and isinstance(scheme.weight.granularity, PerGroup), name
        size = scheme.weight.granularity.size
        scale = scheme.weight.scale_dtype.itemsize + 4 * scheme.weight.is_asymmetric
        each = 0.5 + (1 + 4 / SCALE_BLOCK if is_double_nf4(scheme.weight) else scale) / size
        saved += rows * columns * (width - each)
    cut = settings.tensor_model_parallel_size * settings.pipeline_model_parallel_size
    return saved / cut

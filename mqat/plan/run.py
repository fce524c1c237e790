"""Everything about a run that can be decided, and refused, before any process group exists."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mqat.config import ExportConfig, ModelConfig, RunConfig
from mqat.data.sources import resolve
from mqat.errors import UserError
from mqat.export.exporter import ExportOptions
from mqat.export.exporters import exporter
from mqat.kernels.gemm import has_bf16_units
from mqat.models.adapters import Adapters
from mqat.models.decoder import FAMILIES, DecoderConfig
from mqat.models.schemes import Scheme, linear_schemes
from mqat.parallel.layout import check_group_sizes, check_parallel_sizes
from mqat.plan.adapters import check_start, rank_adapters, read_adapters
from mqat.plan.attention import check_attention
from mqat.plan.compressed import check_compressed, packed_savings
from mqat.plan.origin import Opener, Origin, read_source
from mqat.plan.quantized_layers import quantized_layers
from mqat.plan.run_options import check_run_options
from mqat.plan.teacher import read_teacher
from mqat.quant.algorithm import Recipe
from mqat.report.plots import check_plots
from mqat.runtime import groups
from mqat.specs.megatron_options import check_switches


@dataclass(frozen=True)
class RunPlan:
    """A validated run.

    Attributes:
        config: As loaded.
        model: Global sizes of the model.
        source: Where weights come from.
        layers: Global name -> scheme, of quantized linears, tables and caches.
        recipes: Global name -> what is done to its weight first, of quantized linears and tables.
        dtype: Of parameters and activations.
        data_parallel: World size / (TP x PP x CP).
        adapters: What is trained, if not the weights.
        teacher: Another model than the one that is trained, to learn from, and where its weights are.
    """

    config: RunConfig
    model: DecoderConfig
    source: Origin
    layers: dict[str, Scheme]
    recipes: dict[str, Recipe]
    dtype: torch.dtype
    data_parallel: int
    teacher: tuple[DecoderConfig, Origin] | None = None
    adapters: Adapters | None = None

    @property
    def run_dir(self) -> Path:
        """Where the run writes."""
        return Path(self.config.exp_manager.exp_dir)


def resolve_dtype(precision: str) -> torch.dtype:
    """`auto` is bf16 on CUDA and on CPUs that multiply bf16 natively, otherwise fp32.

    Emulated bf16 is several times slower than fp32 on a CPU without AVX512-BF16 or AMX.
    """
    if precision == "32":
        return torch.float32
    native = has_bf16_units(groups.device())
    return torch.bfloat16 if precision == "bf16" or native else torch.float32


def _check_experts(config: RunConfig, model: DecoderConfig, world_size: int) -> None:
    """Refuses layouts and reports that are not built for experts, and settings without them."""
    settings, tp = config.model, config.model.tensor_model_parallel_size
    has_correction = model.router is not None and model.router.correction is not None
    if settings.moe_router_bias_update_rate and not has_correction:
        raise UserError(
            f"config: model.moe_router_bias_update_rate: routers of a {model.family} model have no "
            "correction that could be moved."
        )
    if not model.num_experts:
        for key in ("expert_tensor_parallel_size", "moe_aux_loss_coeff"):
            if getattr(settings, key):
                raise UserError(f"config: model.{key}: a {model.family} model has no experts.")
        return
    groups.check_expert_parallel(
        world_size,
        tensor_parallel=tp,
        pipeline_parallel=settings.pipeline_model_parallel_size,
        expert_parallel=settings.expert_model_parallel_size,
        expert_tensor_parallel=settings.expert_tensor_parallel_size,
    )
    if tp > 1 and not settings.sequence_parallel:
        raise UserError(
            f"config: model.tensor_model_parallel_size={tp}: experts are trained with tensor "
            "parallelism only together with sequence parallelism; set model.sequence_parallel=true."
        )


def _check_batches(config: RunConfig, world_size: int) -> int:
    """Data-parallel size; refuses world and batch sizes that do not fit together."""
    settings = config.model
    trainer = config.trainer
    if world_size < 1:
        raise UserError(f"world size {world_size} must be at least 1.")
    if trainer.devices is not None and trainer.devices * trainer.num_nodes != world_size:
        raise UserError(
            f"world size {world_size} does not match trainer.devices={trainer.devices} x "
            f"trainer.num_nodes={trainer.num_nodes}; start torchrun with that many processes."
        )
    model_parallel = settings.tensor_model_parallel_size * settings.pipeline_model_parallel_size
    model_parallel *= settings.context_parallel_size
    if world_size % model_parallel:
        raise UserError(
            f"world size {world_size} is not a multiple of tensor_model_parallel_size="
            f"{settings.tensor_model_parallel_size} x pipeline_model_parallel_size="
            f"{settings.pipeline_model_parallel_size} x context_parallel_size="
            f"{settings.context_parallel_size}; start torchrun with --nproc-per-node "
            f"{model_parallel} or a multiple of it."
        )
    data_parallel = world_size // model_parallel
    per_step = settings.micro_batch_size * data_parallel
    if settings.global_batch_size % per_step:
        raise UserError(
            f"model.global_batch_size={settings.global_batch_size} is not a multiple of "
            f"micro_batch_size={settings.micro_batch_size} x data-parallel size {data_parallel}."
        )
    if config.quantization.num_calib_size % per_step:
        raise UserError(
            f"quantization.num_calib_size={config.quantization.num_calib_size} is not a multiple "
            f"of micro_batch_size={settings.micro_batch_size} x data-parallel size "
            f"{data_parallel}; the same sequences must be seen on every layout."
        )
    sizes = {
        "model.global_batch_size": settings.global_batch_size,
        "quantization.num_calib_size": config.quantization.num_calib_size,
    }
    for key, size in sizes.items():
        stages = settings.pipeline_model_parallel_size
        if settings.virtual_pipeline_model_parallel_size and size // per_step % stages:
            raise UserError(
                f"interleaved pipeline: {key}={size} gives {size // per_step} microbatches, not a "
                f"multiple of pipeline_model_parallel_size={stages}; make it a multiple of "
                f"{per_step * stages}."
            )
    return data_parallel


def _check_data(settings: ModelConfig, model: DecoderConfig) -> None:
    """Refuses sequences that the model or the layout cannot hold, and a run without text."""
    data, tp, cp = (
        settings.data,
        settings.tensor_model_parallel_size,
        settings.context_parallel_size,
    )
    multiple = math.lcm(2 * cp, cp * tp if settings.sequence_parallel else 1)
    if cp > 1 and data.seq_length % multiple:
        raise UserError(
            f"model.data.seq_length={data.seq_length} is not a multiple of {multiple}: "
            f"context_parallel_size={cp} cuts sequences into {2 * cp} chunks"
            + (f", tensor_model_parallel_size={tp} each rank's tokens" if multiple > 2 * cp else "")
            + f". Use {data.seq_length + -data.seq_length % multiple}, for example."
        )
    if cp > 1 and settings.transformer_engine and data.format == "sft":
        raise UserError(
            f"model.data.format=sft packs conversations, which Transformer Engine's attention would cut "
            f"one by one with context_parallel_size={cp}; set model.transformer_engine=false, or "
            "context_parallel_size=1."
        )
    if settings.sequence_parallel and data.seq_length % tp:
        raise UserError(
            f"model.data.seq_length={data.seq_length} is not a multiple of "
            f"tensor_model_parallel_size={tp}, which sequence parallelism needs."
        )
    if data.seq_length > model.max_position_embeddings:
        raise UserError(
            f"model.data.seq_length={data.seq_length} exceeds the model's "
            f"max_position_embeddings={model.max_position_embeddings}."
        )
    if data.packaged is None and not (data.train and data.validation):
        raise UserError(
            "config: model.data.train and model.data.validation must each name at least one file "
            "(hold out whole documents), or set model.data.packaged."
        )


def _named_data(settings: ModelConfig) -> dict[str, list[str]]:
    data = settings.data
    named = {"train": data.train, "validation": data.validation}
    return {f"model.data.{key}": paths for key, paths in named.items() if not data.packaged}


def missing_data(settings: ModelConfig) -> dict[str, list[str]]:
    """Key -> those of its files, patterns and data sets that are not here."""

    def is_missing(path: str, key: str) -> bool:
        try:
            resolve([path], key)
        except UserError:
            return True
        return False

    found = {
        key: [path for path in paths if is_missing(path, key)]
        for key, paths in _named_data(settings).items()
    }
    return {key: missing for key, missing in found.items() if missing}


def _check_files(settings: ModelConfig) -> None:
    for key, paths in _named_data(settings).items():
        resolve(paths, f"config: {key}")


def _check_decoder(config: RunConfig, model: DecoderConfig) -> None:
    family = FAMILIES[model.family]
    given = {
        "quantization.decoder_type": config.quantization.decoder_type,
        "export.decoder_type": config.export.decoder_type,
    }
    for key, decoder in given.items():
        if decoder is not None and decoder not in family.decoder_types:
            raise UserError(
                f"config: {key}={decoder}, but the model is {family.name}; leave it out, or use "
                f"{' or '.join(family.decoder_types)}."
            )


def export_options(config: ExportConfig) -> ExportOptions:
    """What the exporter is asked for."""
    return ExportOptions(
        config.inference_tensor_parallel,
        config.inference_pipeline_parallel,
        config.dtype,
        config.allow_requantization,
    )


def make_plan(
    config: RunConfig, world_size: int | None = None, *, opener: Opener | None = None
) -> RunPlan:
    """Checks a configuration as a whole, on every rank alike, touching no process group.

    Args:
        config: From `load_config`.
        world_size: Number of processes; default: torchrun's `WORLD_SIZE`, or 1.
        opener: Instead of `open_origin`, to plan a run where the files of models and data are not.

    Raises:
        UserError: Anything that would fail later: sizes that do not divide, groups that do not fit
            the training or the inference layout, an algorithm the export format lacks, missing files.
    """
    world = groups.world_size() if world_size is None else world_size
    if config.exp_manager.quality_report:
        check_plots()
    check_run_options(config)
    settings = config.model
    check_switches(settings.megatron, settings.ddp)
    model, source = read_source(config, opener)
    _check_decoder(config, model)
    tp, pp = settings.tensor_model_parallel_size, settings.pipeline_model_parallel_size
    check_parallel_sizes(
        model, tp=tp, pp=pp, virtual_pp=settings.virtual_pipeline_model_parallel_size or 1,
        ep=settings.expert_model_parallel_size,
    )  # fmt: skip
    _check_experts(config, model, world)
    data_parallel = _check_batches(config, world)
    _check_data(settings, model)
    if opener is None:
        _check_files(settings)
    check_attention(settings, model)
    layers, recipes = quantized_layers(config, model)
    check_group_sizes(
        model, layers, tp=tp, purpose="tensor_model_parallel_size",
        expert_tp=settings.expert_tensor_parallel_size,
    )  # fmt: skip
    adapters = read_adapters(config, model, layers)
    check_start(config, layers, recipes, source)
    check_compressed(config, model, layers, recipes, source)
    _check_export(config, model, layers, adapters)
    return RunPlan(
        config=config,
        model=model,
        source=source,
        layers=layers,
        recipes=recipes,
        dtype=resolve_dtype(config.trainer.precision),
        data_parallel=data_parallel,
        teacher=read_teacher(config, model, source, opener),
        adapters=adapters,
    )


def _check_export(
    config: RunConfig,
    model: DecoderConfig,
    layers: Mapping[str, Scheme],
    adapters: Adapters | None,
) -> None:
    """Refuses what a directory cannot hold."""
    export, is_beside = config.export, adapters is not None and not adapters.is_merged
    if export.format is None:
        return
    target = exporter(export.format, export.style)
    if export.format == "peft" and not is_beside:
        raise UserError(
            "config: export.format=peft writes adapters beside the weights, of which this run has none; "
            "set model.peft.peft_scheme=lora with merge: false, or export hf."
        )
    target.check(model, layers, export_options(export))
    if is_beside:
        exporter("peft").check(model, layers, ExportOptions())


def describe(plan: RunPlan) -> dict[str, Any]:
    """The decisions a person wants to see before a long run."""
    settings = plan.config.model
    return (
        {
            "layout": f"TP {settings.tensor_model_parallel_size} x PP "
            f"{settings.pipeline_model_parallel_size} x CP {settings.context_parallel_size} "
            f"x DP {plan.data_parallel}"
            + (f" x EP {settings.expert_model_parallel_size}" if plan.model.num_experts else "")
            + (" + sequence parallel" if settings.sequence_parallel else ""),
            "precision": str(plan.dtype).removeprefix("torch.")
            + (" (auto, on this machine)" if plan.config.trainer.precision == "auto" else ""),
            "algorithm": (plan.config.quantization.algorithm or "rules") if plan.layers else "none",
            "quantized linears": len(linear_schemes(plan.layers)),
            "key/value cache": plan.config.quantization.kv_cache if plan.layers else None,
        }
        | _described_adapters(plan)
        | _described_teacher(plan)
    )


def _described_adapters(plan: RunPlan) -> dict[str, str]:
    adapters = plan.adapters
    if adapters is None:
        return {}
    kind = "merged into what is quantized" if adapters.is_merged else "beside the weights"
    packed = {"backbone": "packed, never in floats"} if plan.config.quantization.compress else {}
    return packed | {
        "adapters": f"{len(adapters.names)} linears, rank {adapters.rank}, alpha {adapters.alpha:g}, "
        f"{kind}; everything else is frozen"
    }


def _described_teacher(plan: RunPlan) -> dict[str, str]:
    distill = plan.config.quantization.distill
    if distill is None:
        return {}
    who = distill.teacher or "the unquantized weights that QAT starts from"
    return {"teacher": f"{who} ({distill.divergence}, weight {distill.weight:g})"}


def memory_estimate(plan: RunPlan) -> dict[str, str]:
    """Bytes of weights, gradients and optimizer state on the fullest rank.

    fp32 gradient buffer; AdamW moments, and a fp32 copy of bf16 weights, spread over data- and
    context-parallel ranks (distributed optimizer): not where `mqat ptq` is said to be all. With
    adapters, weights have neither. Activations are not counted, nor is what a teacher takes besides its
    weights.
    """
    settings, distill = plan.config.model, plan.config.quantization.distill
    dense, inside = rank_parameters(plan.model, settings)
    tp = settings.tensor_model_parallel_size
    cut = settings.expert_model_parallel_size * (settings.expert_tensor_parallel_size or tp)
    width = plan.dtype.itemsize
    trains = plan.config.command != "ptq" or settings.pretrain.max_steps > 0
    state = (8 if width == 4 else 12) if trains else 0
    spread = plan.data_parallel * settings.context_parallel_size
    parameters = dense + inside
    total = parameters * (width + 4) + state * (dense / spread + inside / (spread * tp / cut))
    if plan.adapters is not None:
        trained = rank_adapters(plan.model, settings, plan.adapters)
        saved = 0.0
        if plan.config.quantization.compress:
            saved = packed_savings(plan.model, settings, linear_schemes(plan.layers), width)
        total = parameters * width - saved + trained * (width + 4 + state / spread)
    return {
        "parameters per rank": f"{parameters / 1e6:.1f} M",
        f"weights, gradients{', optimizer' * trains} per rank": f"{total / 2**30:.2f} GiB",
    } | ({} if distill is None or distill.offload_teacher else _teacher_estimate(plan))


def _teacher_estimate(plan: RunPlan) -> dict[str, str]:
    model = plan.model if plan.teacher is None else plan.teacher[0]
    size = sum(rank_parameters(model, plan.config.model)) * plan.dtype.itemsize
    return {"teacher's weights per rank": f"{size / 2**30:.2f} GiB"}


def rank_parameters(model: DecoderConfig, settings: ModelConfig) -> tuple[float, float]:
    """Elements on the fullest rank: outside of experts, and of experts.

    Experts are cut over EP and over TP of their own. Norms, routers, biases of row-parallel linears and
    learned positions are whole on every tensor-parallel rank.
    """
    tp, pp = settings.tensor_model_parallel_size, settings.pipeline_model_parallel_size
    counts = {key: math.prod(shape) for key, shape in model.checkpoint_shapes().items()}
    linears = experts = 0
    for layer in range(model.num_layers):  # layers that are alike have one key
        for linear in model.linears_of(layer):
            count = counts.pop(model.place(linear.key, layer)[0], 0)
            if linear.expert is not None:
                experts += count
                continue
            linears += count
            if linear.name in model.biases and linear.parallel == "column":
                linears += counts.pop(model.place(linear.bias_key, layer)[0], 0)
    tables = {table.key: counts.pop(table.key) for table in model.tables}
    positions = model.architecture.positions
    learned = 0 if positions is None else tables.pop(positions.key)
    on_one_stage = list(tables.values()) if pp == 1 else list(tables.values())[:1]
    dense = (linears / pp + sum(on_one_stage)) / tp + sum(counts.values()) / pp + learned
    cut = settings.expert_model_parallel_size * (settings.expert_tensor_parallel_size or tp)
    each = model.num_layers // pp  # layers of a stage, of which some may be without experts
    with_experts = [
        sum(map(model.has_experts, range(first, first + each)))
        for first in range(0, model.num_layers, each)
    ]
    return dense, experts * max(with_experts) / max(1, sum(with_experts)) / cut

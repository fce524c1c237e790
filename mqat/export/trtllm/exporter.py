"""The exporter of TensorRT-LLM checkpoints: what fits an inference layout, and which files there are."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mqat.checkpoints.reader import CheckpointReader
from mqat.errors import UserError, refusals, refuse
from mqat.export.exporter import DirectoryContents, ExportOptions
from mqat.export.kv_cache import cache_algorithm
from mqat.export.operands import group_size, operands_text
from mqat.export.reshard import InferenceRank, count, linear_rows
from mqat.export.special_tokens import generation_texts, special_tokens
from mqat.export.stream import TensorPlan
from mqat.export.trtllm import qnemo
from mqat.export.trtllm.config import config_json, is_mixed, quant_cfg_json, stage_schemes
from mqat.export.trtllm.forms import FORMS, TENSORS, TrtllmForm
from mqat.export.trtllm.positions import position_fields
from mqat.models.decoder import DecoderConfig
from mqat.models.schemes import Scheme, linear_schemes
from mqat.models.structure import Linear, in_layer, is_expert, split_name
from mqat.quant.scheme import LinearScheme

_REQUANTIZED = (
    "W8A16 checkpoints hold unquantized weights: TensorRT-LLM quantizes them again at load time, "
    "with amax/128 of each output channel on each rank, so the served weights are not the trained "
    "ones."
)
_ONE_INPUT = (
    "{} and {} more linears of experts have input scales of their own; TensorRT-LLM has one for "
    "the experts of a layer: the largest is written. Unquantized inputs (int4) are served as trained."
)


class TensorRtLlmExporter:
    """For `trtllm-build` of TensorRT-LLM 0.17 to 1.2: one file for each inference rank."""

    format = "trtllm"
    output_name = "trtllm"
    is_served = True
    style = None

    def check(
        self, model: DecoderConfig, schemes: Mapping[str, Scheme], options: ExportOptions
    ) -> None:
        """As `Exporter.check`."""
        layers, tp = linear_schemes(schemes), options.tensor_parallel
        if options.max_shard_bytes is not None:
            raise UserError(
                "export.format=trtllm: every inference rank has one file; leave out --max-shard-gb."
            )
        found = refusals([partial(_check_family, model), partial(position_fields, model)])
        basic = refusals(
            [
                partial(_check_layout, model, tp, options.pipeline_parallel),
                partial(TENSORS.check, model, schemes),
            ]
        )
        further: list[Callable[[], object]] = [
            partial(_check_experts, model, layers),
            partial(_check_requantized, layers, options.allow_requantization),
            partial(stage_schemes, model, layers, options.pipeline_parallel),
            partial(_check_groups, model, layers, tp),
        ]
        refuse(found + basic + ([] if basic else refusals(further)))

    def warning(self, schemes: Mapping[str, Scheme]) -> str | None:
        """That the loader changes weights, or that a layer's experts share an input scale."""
        layers = linear_schemes(schemes)
        if any(FORMS.of(scheme).is_requantized for scheme in layers.values()):
            return _REQUANTIZED
        static = [n for n, scheme in layers.items() if is_expert(n) and scheme.input is not None]
        return _ONE_INPUT.format(static[0], len(static) - 1) if static else None

    def contents(
        self, reader: CheckpointReader, tokenizer: Path, options: ExportOptions
    ) -> DirectoryContents:
        """As `Exporter.contents`."""
        tp, pp = options.tensor_parallel, options.pipeline_parallel
        weights: dict[str, Callable[[], list[TensorPlan]]] = {}
        for index in range(tp * pp):
            rank = InferenceRank(index % tp, tp, index // tp, pp)
            weights[f"rank{index}.safetensors"] = partial(
                TENSORS.plan, reader, rank, options.torch_dtype
            )
        model, layers, cache = reader.model, reader.layers, cache_algorithm(reader.kv_cache)
        texts: dict[str, Any] = {"config.json": config_json(model, layers, options, cache)}
        mixed = quant_cfg_json(model, layers, pp=pp, kv_cache=cache)
        if mixed is not None:
            texts["quant_cfg.json"] = mixed
        special = special_tokens(tokenizer, model)
        texts |= generation_texts(tokenizer, special) if special else {}
        if options.archive is not None:
            texts |= qnemo.tokenizer_texts(tokenizer)
        return DirectoryContents(weights, texts, as_tar=options.archive == "tar")


def _check_family(model: DecoderConfig) -> None:
    """Refuses models of which TensorRT-LLM has no class, or no switch for their biases."""
    family = model.architecture
    if model.shared_intermediate_size or model.dense_layers:
        kind = "shared experts" if model.shared_intermediate_size else "layers without experts"
        raise UserError(
            f"export.format=trtllm: this {model.family} model has {kind}, which are not written beside "
            "stacked experts; use export.format=hf."
        )
    if family.trtllm_architecture is None:
        raise UserError(
            f"export.format=trtllm: TensorRT-LLM has no {family.name} models; use export.format=hf."
        )
    if not family.trtllm_states_head and model.size("query") != model.hidden_size:
        raise UserError(
            f"export.format=trtllm: head_dim={model.head_dim}, but TensorRT-LLM's "
            f"{family.trtllm_architecture} has heads of hidden_size / num_attention_heads = "
            f"{model.hidden_size / model.num_attention_heads:g} channels; use export.format=hf."
        )
    is_one_switch = len(family.trtllm_biases) == 1
    if is_one_switch and len(model.biases) not in (0, len(model.linears)):
        raise UserError(
            f"biases on {list(model.biases)}: TensorRT-LLM's {family.trtllm_architecture} has them on "
            "all linears or on none; use export.format=hf."
        )


def _check_experts(model: DecoderConfig, layers: Mapping[str, LinearScheme]) -> None:
    """Refuses what TensorRT-LLM's one module for all experts of a layer cannot be told or serve."""
    elsewhere = "use export.format=hf for another server."
    names = [
        in_layer(layer, linear.name)
        for layer in range(model.num_layers)
        for linear in model.linears
        if linear.expert is not None
    ]
    for name in names if layers else ():
        if name not in layers:
            raise UserError(
                f"export.format=trtllm: {name} is not quantized while other linears are; TensorRT-LLM "
                "makes its experts for the algorithm of the whole model. Quantize the experts of all "
                f"layers, or {elsewhere}"
            )
        scheme, form = layers[name], FORMS.of(layers[name])
        if not form.takes_experts:
            known = ", ".join(form.name for form in FORMS.forms if form.takes_experts)
            raise UserError(
                f"{name}: {operands_text(scheme)} is {form.name} in TensorRT-LLM, which is not written "
                f"for experts: its kernels or its loader lack it. Experts can be {known} (fp8, int4, "
                f"int4_awq), or {elsewhere}"
            )
    if names and is_mixed(layers):
        raise UserError(
            "export.format=trtllm: linears are quantized in several ways, which TensorRT-LLM cannot be "
            f"told of a mixture of experts; quantize all in one way, or {elsewhere}"
        )


def _check_layout(model: DecoderConfig, tp: int, pp: int) -> None:
    for key, size in (("tensor", tp), ("pipeline", pp)):
        if size < 1:
            raise UserError(f"export.inference_{key}_parallel={size}: must be at least 1.")
    heads, groups = model.num_attention_heads, model.num_query_groups
    axis = "expert_intermediate_size" if model.num_experts else "intermediate_size"
    inner: int = getattr(model, axis)
    if heads % tp or inner % tp or (groups % tp and tp % groups):
        raise UserError(
            f"export.inference_tensor_parallel={tp} does not fit num_attention_heads={heads}, "
            f"num_query_groups={groups}, {axis}={inner}: it must "
            "divide heads and intermediate size, and divide the groups or be a multiple of them."
        )
    if model.num_layers % pp:
        raise UserError(
            f"export.inference_pipeline_parallel={pp} does not divide num_layers="
            f"{model.num_layers}."
        )


def _check_requantized(layers: Mapping[str, LinearScheme], is_allowed: bool) -> None:
    """Refuses weights that the loader rounds again: without consent, and in any mixture."""
    changed = {name: s for name, s in layers.items() if FORMS.of(s).is_requantized}
    if not changed:
        return
    name, scheme = next(iter(changed.items()))
    others = sorted({FORMS.of(s).name for s in layers.values()} - {FORMS.of(scheme).name})
    mixture = f" in a mixture with {', '.join(others)}" if is_mixed(layers) else ""
    consent = "or accept the second rounding with export.allow_requantization=true"
    if mixture or not is_allowed:
        raise UserError(
            f"{name}: {operands_text(scheme)} cannot be exported to TensorRT-LLM exactly{mixture}. "
            f"{_REQUANTIZED} Use export.format=hf, which keeps them; or int8, int4 or fp8 with their "
            f"inputs quantized; {'or leave the weight unquantized too' if mixture else consent}."
        )


def _check_groups(model: DecoderConfig, layers: Mapping[str, LinearScheme], tp: int) -> None:
    """Refuses groups that the kernels do not take, or that a rank would not hold whole."""
    for name, scheme in layers.items():
        linear, form = model.linear(split_name(name)[1]), FORMS.of(scheme)
        if form.group_sizes:
            _check_int4(model, name, linear, form, group_size(scheme) or 0, tp)
        ranks = tp if linear.parallel == "row" else 1
        FORMS.check_groups(name, scheme, model.size(linear.columns), ranks)


def _check_int4(
    model: DecoderConfig, name: str, linear: Linear, form: TrtllmForm, size: int, tp: int
) -> None:
    """TensorRT-LLM's size rule for group-wise INT4 (quantization/layers.py pads otherwise)."""
    if size not in form.group_sizes:
        allowed = " and ".join(map(str, form.group_sizes))
        raise UserError(
            f"{name}: group_size={size}; TensorRT-LLM's INT4 kernels support {allowed} only."
        )
    multiple = max(64, size) * tp
    sizes = [("in_features", model.size(linear.columns))]
    for parts in linear.trtllm_modules().values():  # with the copies of key/value heads
        local = count(linear_rows(model, linear, parts, InferenceRank(0, tp)))
        sizes.append(("out_features", local * (tp if linear.parallel == "column" else 1)))
    for what, found in sizes:
        if found % multiple:
            fitting = [g for g in form.group_sizes if found % (g * tp) == 0]
            raise UserError(
                f"{name}: {what}={found} is not a multiple of {multiple} (= max(64, group_size={size}) "
                f"x export.inference_tensor_parallel={tp}), as TensorRT-LLM's INT4 kernels need. Group "
                f"sizes that fit here: {fitting or 'none at this size'}; or use a smaller "
                "export.inference_tensor_parallel."
            )

"""The exporter of Hugging Face directories: shards, `config.json` and what goes with it.

Projections are apart (`q_proj`, `k_proj`, ...) and whole: servers fuse and cut them as they like. A
fused linear was trained on one grid, so its parts share their per-tensor scales.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

from mqat.checkpoints.reader import CheckpointReader
from mqat.errors import UserError
from mqat.export.decoder_tensors import DecoderTensors, Naming
from mqat.export.exporter import PRODUCER, DirectoryContents, ExportOptions
from mqat.export.forms import Form, Forms
from mqat.export.operands import group_size, operands_text
from mqat.export.reshard import InferenceRank
from mqat.export.special_tokens import generation_texts, special_tokens
from mqat.export.stream import TensorPlan
from mqat.models.decoder import DecoderConfig
from mqat.models.schemes import Scheme, linear_schemes
from mqat.models.structure import Linear, is_expert, split_name
from mqat.quant.kv_cache import KvCacheScheme
from mqat.quant.scheme import LinearScheme

SHARD_BYTES = 5_000_000_000
NAMING = Naming(
    attrgetter("hf_layer"),
    attrgetter("hf"),
    Linear.hf_modules,
    writes_tied_head=False,
    adds_one=False,
    transposes=True,
)
Modules = Mapping[str, LinearScheme | None]


@dataclass(frozen=True)
class HuggingFaceExporter:
    """For transformers, vLLM, SGLang and TensorRT-LLM's PyTorch backend.

    Attributes:
        style: How its readers want quantized linears to be described.
        tensors: Of the decoder.
        texts: (every linear by its name, caches) -> `quantization_config` of `config.json`, and
            further JSON files.
        is_one_form: All quantized linears must have the same form and group size.
    """

    style: str
    tensors: DecoderTensors
    texts: Callable[
        [Modules, Mapping[str, KvCacheScheme]], tuple[dict[str, Any], dict[str, dict[str, Any]]]
    ]
    is_one_form: bool
    format = "hf"
    output_name = "hf"
    is_served = True

    def check(
        self, model: DecoderConfig, schemes: Mapping[str, Scheme], options: ExportOptions
    ) -> None:
        """As `Exporter.check`."""
        layers, forms = linear_schemes(schemes), self.tensors.forms
        _check_options(options)
        self.tensors.check(model, schemes)
        if self.is_one_form:
            _check_one_form(forms, layers)
        for name, scheme in layers.items():
            if model.linear(split_name(name)[1]).is_transposed_in_hf:
                raise UserError(
                    f"{name}: a {model.family} model of Hugging Face has it transposed (Conv1D), which "
                    "no reader of quantized directories takes for a linear; use export.format=trtllm."
                )
            forms.check_groups(name, scheme, model.linear_shape(split_name(name)[1])[1])

    def warning(self, schemes: Mapping[str, Scheme]) -> str | None:
        """That a layer's experts share an input scale when served; otherwise nothing is changed."""
        static = [
            name for name, scheme in schemes.items() if _has_static_input_of_expert(name, scheme)
        ]
        if not static:
            return None
        return (
            f"{static[0]} and {len(static) - 1} more linears of experts have input scales of their "
            "own; vLLM computes the experts of a layer with the largest. Inputs per token (fp8_pc_pt, "
            "int8_pc_pt) or unquantized (int4) are served as trained."
        )

    def contents(
        self, reader: CheckpointReader, tokenizer: Path, options: ExportOptions
    ) -> DirectoryContents:
        """As `Exporter.contents`."""
        model = reader.model
        plans = self.tensors.plan(reader, InferenceRank(), options.torch_dtype)
        shards = shard(plans, options.max_shard_bytes or SHARD_BYTES)
        special = special_tokens(tokenizer, model)
        config = model.to_hf(options.dtype) | special | {"producer": PRODUCER}
        texts: dict[str, Any] = {"config.json": config, **generation_texts(tokenizer, special)}
        if reader.layers:
            modules: dict[str, LinearScheme | None] = {model.architecture.output_layer.hf: None}
            modules |= NAMING.schemes(model, reader.layers, range(model.num_layers))
            modules |= {
                model.architecture.hf_layer.format(i=layer)
                + selector.hf.removesuffix(".weight"): None
                for layer in range(model.num_layers)
                for selector in model.selectors_of(layer)
                if len(selector.axes) == 2  # a linear to its readers
            }
            config["quantization_config"], more = self.texts(modules, reader.kv_cache)
            texts |= more
        if len(shards) > 1:
            texts["model.safetensors.index.json"] = {
                "metadata": {"total_size": sum(p.num_bytes for p in plans)},
                "weight_map": {plan.name: name for name, ps in shards.items() for plan in ps},
            }
        return DirectoryContents({n: partial(list, ps) for n, ps in shards.items()}, texts)


def _has_static_input_of_expert(name: str, scheme: Scheme) -> bool:
    if not is_expert(name) or not isinstance(scheme, LinearScheme) or scheme.input is None:
        return False
    return scheme.input.has_global_scale or not scheme.input.is_dynamic


def unquantized_modules(modules: Modules) -> list[str]:
    """Exact names of what a quantized directory keeps in the model's dtype, the head first."""
    return [name for name, scheme in modules.items() if scheme is None]


def _check_options(options: ExportOptions) -> None:
    """Refuses what a Hugging Face directory cannot honour."""
    if options.max_shard_bytes is not None and options.max_shard_bytes < 1:
        raise UserError(f"max_shard_bytes={options.max_shard_bytes}: must be at least 1.")
    layout = options.tensor_parallel, options.pipeline_parallel
    if layout != (1, 1) or options.archive is not None:
        raise UserError(
            "export.format=hf: servers split the weights themselves, and a .qnemo holds a TensorRT-LLM "
            "directory; leave out export.inference_tensor_parallel (--inference-tp), "
            "export.inference_pipeline_parallel (--inference-pp) and --qnemo."
        )
    if options.allow_requantization:
        raise UserError(
            "export.format=hf: no loader rounds these weights a second time; leave out "
            "export.allow_requantization (--allow-requantization)."
        )


def _check_one_form(forms: Forms[Form], layers: Mapping[str, LinearScheme]) -> None:
    found: dict[tuple[str, int | None], str] = {}
    for name, scheme in layers.items():
        key = forms.of(scheme).name, group_size(scheme)
        found.setdefault(key, f"{name}: {operands_text(scheme)}")
    if len(found) > 1:
        raise UserError(
            f"{' beside '.join(found.values())}: {forms.server} has no mixtures that servers load. Use "
            "style=compressed-tensors."
        )


def shard(plans: Sequence[TensorPlan], max_bytes: int) -> dict[str, list[TensorPlan]]:
    """File name -> tensors; consecutive tensors share a file while it stays within `max_bytes`."""
    files: list[list[TensorPlan]] = [[]]
    size = 0
    for plan in plans:
        if files[-1] and size + plan.num_bytes > max_bytes:
            files.append([])
            size = 0
        files[-1].append(plan)
        size += plan.num_bytes
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    return {
        f"model-{number:05d}-of-{len(files):05d}.safetensors": file
        for number, file in enumerate(files, start=1)
    }

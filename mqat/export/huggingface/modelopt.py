"""The ModelOpt style, for TensorRT-LLM's PyTorch backend, vLLM and SGLang: its forms and texts.

Follows nvidia-modelopt 0.47 (`modelopt/torch/export/{quant_utils,convert_hf_config}.py`) and what
vLLM's `modelopt` method reads. Scales multiply when dequantizing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mqat.export import operands
from mqat.export import tensor_builders as build
from mqat.export.decoder_tensors import DecoderTensors
from mqat.export.exporter import PRODUCER
from mqat.export.forms import Form, Forms
from mqat.export.huggingface.exporter import (
    NAMING,
    HuggingFaceExporter,
    Modules,
    unquantized_modules,
)
from mqat.export.kv_cache import CacheForm, cache_algorithm
from mqat.export.operands import group_size
from mqat.quant.formats import FP8_E4M3
from mqat.quant.kv_cache import KvCacheScheme


@dataclass(frozen=True)
class ModelOptForm(Form):
    """A form, whose name is a `quant_algo`.

    Attributes:
        operands: What `config_groups` says about weight and input.
        options: Further keys of `hf_quant_config.json`.
    """

    operands: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


_FP8 = {"num_bits": 8, "type": "float", "dynamic": False}
_FP4 = {"num_bits": 4, "type": "float", "dynamic": False, "group_size": 16}
_INT4 = {"num_bits": 4, "type": "int", "dynamic": False}
_AWQ = {"has_zero_point": False, "pre_quant_scale": True}
_INT4_TENSORS = {
    "weight": build.row_pairs_as_bytes,
    "weight_scale": build.model_scale,
    "pre_quant_scale": build.ones,
}
_INPUT = {"input_scale": build.scalar(build.input_scale)}
FORMS = Forms(
    "ModelOpt style",
    (
        ModelOptForm(
            "FP8", operands.FP8_TENSOR, operands.FP8_TENSOR,
            {"weight": build.codes, "weight_scale": build.scalar(build.frozen_scale)} | _INPUT,
            {"weights": _FP8, "input_activations": _FP8},
        ),
        ModelOptForm(
            "FP8_PER_CHANNEL_PER_TOKEN", operands.FP8_CHANNELS, operands.FP8_TOKENS,
            {"weight": build.codes, "weight_scale": build.frozen_scale},
            {
                "weights": _FP8 | {"strategy": "channel"},
                "input_activations": _FP8 | {"strategy": "token", "dynamic": True},
            },
        ),
        ModelOptForm(
            "NVFP4", operands.NVFP4, operands.NVFP4_INPUT,
            {
                "weight": build.column_pairs,
                "weight_scale": build.e4m3_scale,
                "weight_scale_2": build.scalar(build.global_scale),
                "input_scale": build.scalar(build.input_global_scale),
            },
            {"weights": _FP4, "input_activations": _FP4},
        ),
        ModelOptForm("W4A16_AWQ", operands.INT4_GROUPS, None, _INT4_TENSORS, {"weights": _INT4}, _AWQ),
        ModelOptForm(
            "W4A8_AWQ", operands.INT4_GROUPS, operands.FP8_TENSOR,
            _INT4_TENSORS | {"weight_scale_2": build.scalar(build.fp8_range_scale)} | _INPUT,
            {"weights": _INT4, "input_activations": _FP8}, _AWQ,
        ),
    ),
    (
        (
            lambda weight, x: True,
            "This style holds FP8, NVFP4 and INT4 groups, as fp8, fp8_pc_pt, nvfp4, int4_awq and "
            "w4a8_awq have them. Use style=compressed-tensors.",
        ),
    ),
)  # fmt: skip
CACHE = CacheForm(
    lambda cache: {f"{cache.hf_parts[0]}.k_scale": "key", f"{cache.hf_parts[1]}.v_scale": "value"},
    (),
    (FP8_E4M3,),
    is_beside_linears=True,
)


def _texts(
    modules: Modules, caches: Mapping[str, KvCacheScheme]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """`quantization_config`, and `hf_quant_config.json` (which TensorRT-LLM reads first), alike."""
    scheme = next(scheme for scheme in modules.values() if scheme is not None)
    form, size, ignored = FORMS.of(scheme), group_size(scheme), unquantized_modules(modules)
    operands: dict[str, Any] = {kind: dict(v) for kind, v in form.operands.items()}
    sized: dict[str, Any] = {} if size is None else {"group_size": size}
    operands["weights"] |= sized
    config = {
        "quant_method": "modelopt",
        "quant_algo": form.name,
        "ignore": ignored,
        "config_groups": {"group_0": operands | {"targets": ["Linear"]}},
        "producer": PRODUCER,
    } | ({"kv_cache_scheme": dict(_FP8)} if caches else {})
    nested = {
        "producer": PRODUCER,
        "quantization": {
            "quant_algo": form.name,
            "kv_cache_quant_algo": cache_algorithm(caches),
            **sized,
            **form.options,
            "exclude_modules": ignored,
        },
    }
    return config, {"hf_quant_config.json": nested}


TENSORS = DecoderTensors(NAMING, FORMS, CACHE)
MODELOPT = HuggingFaceExporter("modelopt", TENSORS, _texts, is_one_form=True)

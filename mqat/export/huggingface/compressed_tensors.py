"""The compressed-tensors style, for transformers and vLLM: its forms and its configuration.

Names, shapes and the configuration follow the `compressed-tensors` package (0.15 to 0.20):
`compressors/**` and `quantization/{quant_args,quant_config}.py`. Scales multiply when dequantizing.
SmoothQuant and AWQ are folded into weights and norms.
"""

from collections.abc import Mapping
from typing import Any

from mqat.export import operands
from mqat.export import tensor_builders as build
from mqat.export.decoder_tensors import DecoderTensors
from mqat.export.forms import Form, Forms
from mqat.export.huggingface.exporter import (
    NAMING,
    HuggingFaceExporter,
    Modules,
    unquantized_modules,
)
from mqat.export.kv_cache import CacheForm
from mqat.export.operands import is_integer
from mqat.quant.formats import FP8_E4M3, NF4
from mqat.quant.granularity import Granularity, PerChannel, PerGroup, PerTensor, PerToken
from mqat.quant.kv_cache import KvCacheScheme
from mqat.quant.scheme import TensorScheme

_INPUT = {"input_scale": build.input_scale}
_BY_CHANNEL = {"weight": build.codes, "weight_scale": build.column_scale}
_BY_TENSOR = {"weight": build.codes, "weight_scale": build.frozen_scale}
_IN_MODEL_DTYPE = {"weight": build.codes, "weight_scale": build.model_scale}
_WORDS = {"weight_packed": build.words, "weight_shape": build.full_shape}
_WORDS_IN_MODEL_DTYPE = _WORDS | {"weight_scale": build.model_scale}
_NVFP4 = {
    "weight_packed": build.column_pairs,
    "weight_scale": build.e4m3_scale,
    "weight_global_scale": build.inverse(build.global_scale),
}
_NVFP4_INPUT = {"input_global_scale": build.inverse(build.input_global_scale)}
_INT, _FLOAT, _NAIVE, _PACKED, _FP4 = (
    "int-quantized", "float-quantized", "naive-quantized", "pack-quantized", "nvfp4-pack-quantized",
)  # fmt: skip

# The package packs no weights whose inputs are integers too: a byte for each code.
FORMS = Forms(
    "compressed-tensors",
    (
        Form(_INT, operands.INT8_CHANNELS, operands.INT8_TENSOR, _BY_CHANNEL | _INPUT),
        Form(_INT, operands.INT8_CHANNELS, operands.INT8_TOKENS, _BY_CHANNEL),
        Form(_PACKED, operands.INT8_CHANNELS, None, _WORDS | {"weight_scale": build.column_scale}),
        Form(_INT, operands.INT4_GROUPS, operands.INT8_TENSOR, _IN_MODEL_DTYPE | _INPUT),
        Form(_INT, operands.INT4_F32_GROUPS, operands.INT8_SHIFTED_TOKENS, _BY_TENSOR),
        Form(_PACKED, operands.INT4_GROUPS, None, _WORDS_IN_MODEL_DTYPE),
        Form(_PACKED, operands.INT4_F32_GROUPS, None, _WORDS | {"weight_scale": build.frozen_scale}),
        Form(
            _PACKED, operands.UINT4_GROUPS, None,
            _WORDS_IN_MODEL_DTYPE | {"weight_zero_point": build.zero_words},
        ),
        Form(_FLOAT, operands.FP8_TENSOR, operands.FP8_TENSOR, _BY_TENSOR | _INPUT),
        Form(_FLOAT, operands.FP8_TENSOR, operands.FP8_TOKENS, _BY_TENSOR),
        Form(_NAIVE, operands.FP8_TENSOR, None, _BY_TENSOR),
        Form(_FLOAT, operands.FP8_CHANNELS, operands.FP8_TENSOR, _BY_CHANNEL | _INPUT),
        Form(_FLOAT, operands.FP8_CHANNELS, operands.FP8_TOKENS, _BY_CHANNEL),
        Form(_NAIVE, operands.FP8_CHANNELS, None, _BY_CHANNEL),
        Form(_FP4, operands.NVFP4, operands.NVFP4_INPUT, _NVFP4 | _NVFP4_INPUT),
        Form(_FP4, operands.NVFP4, None, _NVFP4),
    ),
    (
        (
            lambda weight, x: is_integer(weight) and x is not None and x.format == FP8_E4M3,
            "Integer weights with FP8 inputs are read by TensorRT-LLM: use export.format=trtllm or "
            "style=modelopt.",
        ),
        (lambda weight, x: weight.scale_name == "float8_e8m0fnu", "Use nvfp4 or fp8_pc_pt."),
        (lambda weight, x: weight.format == NF4, "Use int4_awq."),
    ),
)  # fmt: skip
CACHE = CacheForm(
    lambda cache: {f"{cache.hf}.k_scale": "key", f"{cache.hf}.v_scale": "value"},
    (1,),
    (FP8_E4M3,),
    is_beside_linears=True,
)
_CACHE_SCHEME = {
    "num_bits": 8, "type": "float", "dynamic": False, "symmetric": True, "strategy": "tensor",
}  # fmt: skip


def _texts(
    modules: Modules, caches: Mapping[str, KvCacheScheme]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The `quantization_config` of `config.json`: a group for each combination of operands."""
    schemes = list(dict.fromkeys(scheme for scheme in modules.values() if scheme is not None))
    formats = {FORMS.of(scheme).name for scheme in schemes}
    groups = {}
    for number, scheme in enumerate(schemes):
        settings: dict[str, Any] = {
            "targets": ["Linear"],
            "weights": scheme.weight and _arguments(scheme.weight),
            "input_activations": scheme.input and _arguments(scheme.input),
            "output_activations": None,
        }
        if len(schemes) > 1:
            settings["targets"] = [name for name, found in modules.items() if found == scheme]
        if len(formats) > 1:
            settings["format"] = FORMS.of(scheme).name
        groups[f"group_{number}"] = settings
    config = {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision" if len(formats) > 1 else next(iter(formats)),
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "config_groups": groups,
        "ignore": unquantized_modules(modules),
        "kv_cache_scheme": dict(_CACHE_SCHEME) if caches else None,
    }
    return config, {}


def _arguments(scheme: TensorScheme) -> dict[str, Any]:
    granularity = scheme.granularity
    is_local = scheme.is_dynamic and scheme.has_global_scale  # groups at run time, the rest static
    rounded = {"scale_dtype": "torch.float8_e4m3fn"} if scheme.has_global_scale else {}
    return {
        "num_bits": scheme.format.bits,
        "type": "float" if scheme.format.is_float else "int",
        "symmetric": not scheme.is_asymmetric,
        "strategy": "tensor_group" if scheme.has_global_scale else _strategy(granularity),
        "group_size": granularity.size if isinstance(granularity, PerGroup) else None,
        "dynamic": "local" if is_local else scheme.is_dynamic,
        **rounded,
    }


def _strategy(granularity: Granularity) -> str:
    names = {PerTensor: "tensor", PerChannel: "channel", PerToken: "token"}
    return names.get(type(granularity), "group")


TENSORS = DecoderTensors(NAMING, FORMS, CACHE)
COMPRESSED_TENSORS = HuggingFaceExporter("compressed-tensors", TENSORS, _texts, is_one_form=False)

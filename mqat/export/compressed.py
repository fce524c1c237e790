"""The compressed-tensors form of each algorithm, for transformers and vLLM.

Names, shapes and the configuration follow the `compressed-tensors` package (0.15 to 0.20):
`compressors/**` and `quantization/{quant_args,quant_config}.py`. Scales multiply when dequantizing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mqat.errors import UserError
from mqat.export import linears as content
from mqat.export.names import linear_of
from mqat.models.decoder import DecoderConfig
from mqat.quant.granularity import Granularity, PerChannel, PerGroup, PerTensor, PerToken
from mqat.quant.scheme import LinearScheme, TensorScheme


@dataclass(frozen=True)
class CompressedFormat:
    """How compressed-tensors holds an algorithm.

    Attributes:
        format: Its name there.
        tensors: Of each linear: suffix -> content.
    """

    format: str
    tensors: Mapping[str, content.Maker]


_PACKED = {"weight_packed": content.words, "weight_shape": content.full_shape}
_PER_CHANNEL = {"weight": content.codes, "weight_scale": content.column_scale}
_STATIC_INPUT = {"input_scale": content.input_scale}
_INT8 = CompressedFormat("int-quantized", _PER_CHANNEL | _STATIC_INPUT)
_INT4 = CompressedFormat("pack-quantized", _PACKED | {"weight_scale": content.model_scale})
# A further algorithm is a further row. SmoothQuant and AWQ are folded into weights and norms. The
# package packs no weights whose inputs are integers too: a byte for each code.
FORMATS = {
    "int8": _INT8,
    "int8_sq": _INT8,
    "int8_pc_pt": CompressedFormat("int-quantized", _PER_CHANNEL),
    "int8_wo": CompressedFormat("pack-quantized", _PACKED | {"weight_scale": content.column_scale}),
    "int4": _INT4,
    "int4_awq": _INT4,
    "w_int4_sym": _INT4,
    "w_uint4_asym": CompressedFormat(
        "pack-quantized",
        _PACKED | {"weight_scale": content.model_scale, "weight_zero_point": content.zero_words},
    ),
    "int4_w_int8_a": CompressedFormat(
        "int-quantized",
        {"weight": content.codes, "weight_scale": content.model_scale} | _STATIC_INPUT,
    ),
    "8da4w": CompressedFormat(
        "int-quantized", {"weight": content.codes, "weight_scale": content.frozen_scale}
    ),
    "fp8": CompressedFormat(
        "float-quantized",
        {"weight": content.codes, "weight_scale": content.frozen_scale} | _STATIC_INPUT,
    ),
    "fp8_pc_pt": CompressedFormat("float-quantized", _PER_CHANNEL),
    "nvfp4": CompressedFormat(
        "nvfp4-pack-quantized",
        {
            "weight_packed": content.column_pairs,
            "weight_scale": content.block_scale,
            "weight_global_scale": content.inverse_global_scale,
            "input_global_scale": content.inverse_input_global_scale,
        },
    ),
}
_INSTEAD = {
    "w4a8_awq": "INT4 weights with static FP8 inputs are read by TensorRT-LLM: use export.format=trtllm "
    "or style=modelopt.",
    "mxfp4": "Use nvfp4.",
    "mxfp8": "Use fp8_pc_pt.",
    "nf4": "Use int4_awq.",
}


def check_exportable(model: DecoderConfig, layers: Mapping[str, LinearScheme]) -> None:
    """Refuses algorithms and sizes that the format lacks.

    Raises:
        ValueError: Names the setting, and what would work.
    """
    for name, scheme in layers.items():
        if scheme.name not in FORMATS:
            raise UserError(
                f"quantization.algorithm={scheme.name} has no compressed-tensors form. "
                + _INSTEAD.get(scheme.name, f"Exportable algorithms: {sorted(FORMATS)}.")
            )
        granularity = scheme.weight.granularity if scheme.weight else None
        width = model.linear_shape(linear_of(name))[1]
        if isinstance(granularity, PerGroup) and width % granularity.size:
            fitting = [size for size in (32, 64, 128, 256) if width % size == 0]
            raise UserError(
                f"{name}: group_size={granularity.size} does not divide in_features={width}, and "
                "compressed-tensors has no shorter last group. Group sizes that fit: "
                f"{fitting or 'none of the usual ones'}."
            )


def quantization_config(modules: Mapping[str, LinearScheme | None]) -> dict[str, Any]:
    """The `quantization_config` of `config.json`.

    Args:
        modules: Every linear of the decoder by its name; None is unquantized.
    """
    schemes = list(dict.fromkeys(scheme for scheme in modules.values() if scheme is not None))
    formats = {FORMATS[scheme.name].format for scheme in schemes}
    groups = {}
    for number, scheme in enumerate(schemes):
        group: dict[str, Any] = {
            "targets": ["Linear"],
            "weights": scheme.weight and _arguments(scheme.weight),
            "input_activations": scheme.input and _arguments(scheme.input),
            "output_activations": None,
        }
        if len(schemes) > 1:
            group["targets"] = [name for name, found in modules.items() if found == scheme]
        if len(formats) > 1:
            group["format"] = FORMATS[scheme.name].format
        groups[f"group_{number}"] = group
    return {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision" if len(formats) > 1 else next(iter(formats)),
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "config_groups": groups,
        "ignore": ["lm_head", *(name for name, scheme in modules.items() if scheme is None)],
        "kv_cache_scheme": None,
    }


def _arguments(scheme: TensorScheme) -> dict[str, Any]:
    granularity = scheme.granularity
    is_local = scheme.is_dynamic and scheme.has_global_scale  # blocks at run time, the rest static
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

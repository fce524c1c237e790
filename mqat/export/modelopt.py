"""The ModelOpt form of each algorithm, for TensorRT-LLM's PyTorch backend, vLLM and SGLang.

Follows nvidia-modelopt 0.47 (`modelopt/torch/export/{quant_utils,convert_hf_config}.py`) and what
vLLM's `modelopt` method reads. Scales multiply when dequantizing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mqat import __version__
from mqat.errors import UserError
from mqat.export import linears as content
from mqat.quant.granularity import PerGroup
from mqat.quant.scheme import LinearScheme


@dataclass(frozen=True)
class ModelOptFormat:
    """How ModelOpt's exports hold an algorithm.

    Attributes:
        quant_algo: Its name there.
        tensors: Of each linear: suffix -> content.
        operands: What `config_groups` says about weight and input.
        is_awq: Group-wise INT4 weights, with options that say so.
    """

    quant_algo: str
    tensors: Mapping[str, content.Maker]
    operands: Mapping[str, Mapping[str, Any]]
    is_awq: bool = False


_FP8 = {"num_bits": 8, "type": "float", "dynamic": False}
_FP4 = {"num_bits": 4, "type": "float", "dynamic": False, "group_size": 16}
_INT4_TENSORS = {
    "weight": content.row_pairs_as_bytes,
    "weight_scale": content.model_scale,
    "pre_quant_scale": content.ones,
}
_INT4 = {"num_bits": 4, "type": "int", "dynamic": False}
_INT4_AWQ = ModelOptFormat("W4A16_AWQ", _INT4_TENSORS, {"weights": _INT4}, is_awq=True)
# A further algorithm is a further row.
FORMATS = {
    "fp8": ModelOptFormat(
        "FP8",
        {
            "weight": content.codes,
            "weight_scale": content.scalar_scale,
            "input_scale": content.scalar_input_scale,
        },
        {"weights": _FP8, "input_activations": _FP8},
    ),
    "fp8_pc_pt": ModelOptFormat(
        "FP8_PER_CHANNEL_PER_TOKEN",
        {"weight": content.codes, "weight_scale": content.frozen_scale},
        {
            "weights": _FP8 | {"strategy": "channel"},
            "input_activations": _FP8 | {"strategy": "token", "dynamic": True},
        },
    ),
    "nvfp4": ModelOptFormat(
        "NVFP4",
        {
            "weight": content.column_pairs,
            "weight_scale": content.block_scale,
            "weight_scale_2": content.scalar_global_scale,
            "input_scale": content.scalar_input_global_scale,
        },
        {"weights": _FP4, "input_activations": _FP4},
    ),
    "int4_awq": _INT4_AWQ,
    "w4a8_awq": ModelOptFormat(
        "W4A8_AWQ",
        _INT4_TENSORS
        | {
            "weight_scale_2": content.scalar_fp8_range_scale,
            "input_scale": content.scalar_input_scale,
        },
        {"weights": _INT4, "input_activations": _FP8},
        is_awq=True,
    ),
}


def check_exportable(layers: Mapping[str, LinearScheme]) -> None:
    """Refuses algorithms that the style lacks, and mixtures.

    Raises:
        ValueError: Names the algorithms, and what would work.
    """
    names = sorted({scheme.name for scheme in layers.values()})
    if not set(names) <= FORMATS.keys() or len(set(layers.values())) > 1:
        raise UserError(
            f"quantization.algorithm={', '.join(names)} has no ModelOpt-style form that servers "
            f"load; this style holds one of {sorted(FORMATS)}. Use style=compressed-tensors."
        )


def _scheme(modules: Mapping[str, LinearScheme | None]) -> LinearScheme:
    return next(scheme for scheme in modules.values() if scheme is not None)


def _excluded(modules: Mapping[str, LinearScheme | None]) -> list[str]:
    return ["lm_head", *(name for name, scheme in modules.items() if scheme is None)]


def _group_size(scheme: LinearScheme) -> int | None:
    granularity = scheme.weight.granularity if scheme.weight else None
    return granularity.size if isinstance(granularity, PerGroup) else None


def hf_quant_config(modules: Mapping[str, LinearScheme | None]) -> dict[str, Any]:
    """`hf_quant_config.json`, which TensorRT-LLM reads first.

    Args:
        modules: Every linear of the decoder by its name; None is unquantized.
    """
    scheme = _scheme(modules)
    served, size = FORMATS[scheme.name], _group_size(scheme)
    options: dict[str, Any] = {} if size is None else {"group_size": size}
    if served.is_awq:
        options |= {"has_zero_point": False, "pre_quant_scale": True}
    return {
        "producer": {"name": "mqat", "version": __version__},
        "quantization": {
            "quant_algo": served.quant_algo,
            "kv_cache_quant_algo": None,
            **options,
            "exclude_modules": _excluded(modules),
        },
    }


def quantization_config(modules: Mapping[str, LinearScheme | None]) -> dict[str, Any]:
    """The `quantization_config` of `config.json`, saying the same."""
    scheme = _scheme(modules)
    served, size = FORMATS[scheme.name], _group_size(scheme)
    group: dict[str, Any] = {kind: dict(v) for kind, v in served.operands.items()}
    if size is not None:
        group["weights"]["group_size"] = size
    return {
        "quant_method": "modelopt",
        "quant_algo": served.quant_algo,
        "ignore": _excluded(modules),
        "config_groups": {"group_0": group | {"targets": ["Linear"]}},
        "producer": {"name": "mqat", "version": __version__},
    }

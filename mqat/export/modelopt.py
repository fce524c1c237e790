"""The ModelOpt form of each algorithm, for TensorRT-LLM's PyTorch backend, vLLM and SGLang.

Follows nvidia-modelopt 0.47 (`modelopt/torch/export/{quant_utils,convert_hf_config}.py`) and what
vLLM's `modelopt` method reads. Scales multiply when dequantizing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mqat import __version__
from mqat.export import linears as content
from mqat.quant.scheme import LinearScheme


@dataclass(frozen=True)
class ModelOptFormat:
    """How ModelOpt's exports hold an algorithm.

    Attributes:
        quant_algo: Its name there.
        tensors: Of each linear: suffix -> content.
        operands: What `config_groups` says about weight and input.
    """

    quant_algo: str
    tensors: Mapping[str, content.Maker]
    operands: Mapping[str, Mapping[str, Any]]


_FP8 = {"num_bits": 8, "type": "float", "dynamic": False}
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
}


def check_exportable(layers: Mapping[str, LinearScheme]) -> None:
    """Refuses algorithms that the style lacks, and mixtures.

    Raises:
        ValueError: Names the algorithms, and what would work.
    """
    names = sorted({scheme.name for scheme in layers.values()})
    if not set(names) <= FORMATS.keys() or len(names) > 1:
        raise ValueError(
            f"quantization.algorithm={', '.join(names)} has no ModelOpt-style form that servers "
            f"load; this style holds one of {sorted(FORMATS)}. Use style=compressed-tensors."
        )


def _format(modules: Mapping[str, LinearScheme | None]) -> ModelOptFormat:
    return next(FORMATS[scheme.name] for scheme in modules.values() if scheme is not None)


def _excluded(modules: Mapping[str, LinearScheme | None]) -> list[str]:
    return ["lm_head", *(name for name, scheme in modules.items() if scheme is None)]


def hf_quant_config(modules: Mapping[str, LinearScheme | None]) -> dict[str, Any]:
    """`hf_quant_config.json`, which TensorRT-LLM reads first.

    Args:
        modules: Every linear of the decoder by its name; None is unquantized.
    """
    return {
        "producer": {"name": "mqat", "version": __version__},
        "quantization": {
            "quant_algo": _format(modules).quant_algo,
            "kv_cache_quant_algo": None,
            "exclude_modules": _excluded(modules),
        },
    }


def quantization_config(modules: Mapping[str, LinearScheme | None]) -> dict[str, Any]:
    """The `quantization_config` of `config.json`, saying the same."""
    served = _format(modules)
    return {
        "quant_method": "modelopt",
        "quant_algo": served.quant_algo,
        "ignore": _excluded(modules),
        "config_groups": {
            "group_0": {**{k: dict(v) for k, v in served.operands.items()}, "targets": ["Linear"]}
        },
        "producer": {"name": "mqat", "version": __version__},
    }

"""The key/value cache in exported directories: one scale a layer, or one each for keys and values.

Scales multiply when dequantizing, and are the frozen ones; every rank of a TensorRT-LLM checkpoint
holds the same. FP8 scales are amax / 448 as trained: ModelOpt raises exported ones to at least 1,
which would be another grid than the one that training saw.

Sources: TensorRT-LLM `quantization/quantize.py` (`kv_cache_quantize`) and `models/modeling_utils.py`
(`preprocess_weights`); vLLM `quantization/kv_cache.py` and `compressed_tensors_kv.py`; nvidia-modelopt
`export/{quant_utils,convert_hf_config}.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mqat.checkpoints.reader import CheckpointReader
from mqat.errors import UserError
from mqat.export.names import CORE_ATTENTION
from mqat.export.stream import TensorPlan
from mqat.quant.kv_cache import KvCacheScheme
from mqat.quant.scheme import LinearScheme


@dataclass(frozen=True)
class CacheFormat:
    """How a directory holds the cache's scales.

    Attributes:
        tensors: Name inside a layer -> `kv`, `key` or `value`.
        shape: Of each.
        caches: Those it can hold.
        scheme: What `kv_cache_scheme` in `config.json` says.
    """

    tensors: Mapping[str, str]
    shape: tuple[int, ...]
    caches: tuple[str, ...]
    scheme: Mapping[str, Any]


_FP8 = {"num_bits": 8, "type": "float", "dynamic": False}
FORMATS = {
    "trtllm": CacheFormat({"attention.kv_cache_scaling_factor": "kv"}, (1,), ("int8", "fp8"), {}),
    "compressed-tensors": CacheFormat(
        {"self_attn.k_scale": "key", "self_attn.v_scale": "value"},
        (1,),
        ("fp8",),
        _FP8 | {"symmetric": True, "strategy": "tensor"},
    ),
    "modelopt": CacheFormat(
        {"self_attn.k_proj.k_scale": "key", "self_attn.v_proj.v_scale": "value"}, (), ("fp8",), _FP8
    ),
}


def check_exportable(
    kv_cache: Mapping[str, KvCacheScheme], linears: Mapping[str, LinearScheme], *, target: str
) -> None:
    """Refuses caches that a target's readers do not have; meant to run before training.

    Args:
        kv_cache: Core attention -> scheme; empty: nothing to check.
        linears: Quantized linears.
        target: A key of `FORMATS`.

    Raises:
        ValueError: Names the setting, the reason, and what would work.
    """
    if not kv_cache:
        return
    scheme, held = next(iter(kv_cache.values())), FORMATS[target].caches
    if scheme.name not in held:
        raise UserError(
            f"quantization.kv_cache={scheme.name} cannot be exported as {target}: vLLM, SGLang and "
            f"TensorRT-LLM's PyTorch backend have FP8 caches but no INT8 ones. Use one of {held}, or "
            "export.format=trtllm."
        )
    if target == "trtllm" and not scheme.is_shared:
        raise UserError(
            "quantization.kv_cache_scales=separate cannot be exported to TensorRT-LLM: an engine has "
            "one scale a layer, and its loader would take the larger of two for both, which is not "
            "what was trained. Use quantization.kv_cache_scales=shared."
        )
    if target != "trtllm" and not linears:
        raise UserError(
            f"quantization.kv_cache={scheme.name} without a quantized linear cannot be exported as "
            f"{target}: the style describes a cache only beside a weight format. Choose a "
            "quantization.algorithm too, or export.format=trtllm."
        )


def plan_scales(
    reader: CheckpointReader, target: str, layer: int, prefix: str
) -> Iterator[TensorPlan]:
    """The scales of one layer's cache, float32; none if it is not quantized.

    Args:
        reader: The checkpoint.
        target: A key of `FORMATS`.
        layer: Global number.
        prefix: Of the layer's names in the file.
    """
    name = f"decoder.layers.{layer}.{CORE_ATTENTION}"
    scheme, served = reader.kv_cache.get(name), FORMATS[target]
    if scheme is None:
        return

    def blocks(key: str) -> Iterator[Tensor]:
        yield reader.read(key).reshape(served.shape)

    for suffix, kind in served.tensors.items():
        quantizer = kind if kind == "kv" else scheme.scale_of(kind)
        key = f"quantizers.{name}.{quantizer}_scale"
        yield TensorPlan(prefix + suffix, torch.float32, served.shape, partial(blocks, key))


def quant_algo(kv_cache: Mapping[str, KvCacheScheme]) -> str | None:
    """TensorRT-LLM's and ModelOpt's name of the cache's format."""
    return next((scheme.name.upper() for scheme in kv_cache.values()), None)


def cache_scheme(kv_cache: Mapping[str, KvCacheScheme], target: str) -> dict[str, Any]:
    """The `kv_cache_scheme` entry of a Hugging Face `quantization_config`; empty: unquantized."""
    return {"kv_cache_scheme": dict(FORMATS[target].scheme)} if kv_cache else {}

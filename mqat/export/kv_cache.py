"""The key/value cache in exported directories: one scale a layer, or one each for keys and values.

Scales multiply when dequantizing, and are the frozen ones; every rank of a TensorRT-LLM checkpoint
holds the same. FP8 scales are amax / 448 as trained: ModelOpt raises exported ones to at least 1,
which would be another grid than the one that training saw.

Sources: TensorRT-LLM `quantization/quantize.py` (`kv_cache_quantize`) and `models/modeling_utils.py`
(`preprocess_weights`); vLLM `quantization/kv_cache.py` and `compressed_tensors_kv.py`; nvidia-modelopt
`export/{quant_utils,convert_hf_config}.py`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mqat.checkpoints.reader import CheckpointReader
from mqat.errors import UserError
from mqat.export.stream import TensorPlan
from mqat.models.structure import CORE_ATTENTION, Cache, in_layer, quantizer_key
from mqat.quant.formats import FP8_E4M3, INT8_MIN128, QuantFormat
from mqat.quant.kv_cache import KvCacheScheme

# What TensorRT-LLM and ModelOpt call a cache of these codes.
_ALGORITHMS = {FP8_E4M3: "FP8", INT8_MIN128: "INT8"}


@dataclass(frozen=True)
class CacheForm:
    """How a directory holds the cache's scales.

    Attributes:
        names: Of the scales in a layer -> `kv`, `key` or `value`.
        shape: Of each.
        formats: Codes that its readers' caches hold.
        is_beside_linears: It is described only beside a form of linears.
    """

    names: Callable[[Cache], Mapping[str, str]]
    shape: tuple[int, ...]
    formats: tuple[QuantFormat, ...]
    is_beside_linears: bool

    def check(self, caches: Mapping[str, KvCacheScheme], server: str, *, has_linears: bool) -> None:
        """Refuses caches that the readers do not have.

        Raises:
            UserError: Names the setting, the reason, and what would work.
        """
        for scheme in caches.values():
            if scheme.tensor.format not in self.formats:
                held = [fmt.name for fmt in self.formats]
                raise UserError(
                    f"quantization.kv_cache={scheme.name} cannot be exported to {server}: vLLM, SGLang "
                    "and TensorRT-LLM's PyTorch backend have FP8 caches but no INT8 ones. Use one of "
                    f"{held}, or export.format=trtllm."
                )
            has_one = set(self.names(CORE_ATTENTION).values()) == {"kv"}
            if has_one and not scheme.is_shared:
                raise UserError(
                    f"quantization.kv_cache_scales=separate cannot be exported to {server}: an engine "
                    "has one scale a layer, and its loader would take the larger of two for both, which "
                    "is not what was trained. Use quantization.kv_cache_scales=shared."
                )
            if self.is_beside_linears and not has_linears:
                raise UserError(
                    f"quantization.kv_cache={scheme.name} without a quantized linear cannot be exported "
                    f"to {server}: the style describes a cache only beside a weight format. Choose a "
                    "quantization.algorithm too, or export.format=trtllm."
                )

    def plan(self, reader: CheckpointReader, layer: int, prefix: str) -> Iterator[TensorPlan]:
        """The scales of one layer's cache, float32, named after `prefix`; none if it is unquantized."""
        name = in_layer(layer, CORE_ATTENTION.name)
        scheme = reader.kv_cache.get(name)
        if scheme is None:
            return

        def chunks(key: str) -> Iterator[Tensor]:
            yield reader.read(key).reshape(self.shape)

        for suffix, kind in self.names(reader.model.architecture.cache).items():
            key = quantizer_key(name, scheme.scale_of(kind), "scale")
            yield TensorPlan(torch.float32, self.shape, partial(chunks, key), prefix + suffix)


def cache_algorithm(caches: Mapping[str, KvCacheScheme]) -> str | None:
    """TensorRT-LLM's and ModelOpt's name of the caches' format; None: unquantized."""
    return next((_ALGORITHMS[scheme.tensor.format] for scheme in caches.values()), None)

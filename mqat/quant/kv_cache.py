"""How the key/value cache is quantized, and the schemes of a whole model: linears, tables, caches.

A cache scheme stands under the name of the core attention, such as
`decoder.layers.3.self_attention.core_attention`, beside the schemes of the linears.

| server                    | scales of a layer                                                   |
|---------------------------|---------------------------------------------------------------------|
| TensorRT-LLM engines      | one for keys and values (`kv_cache_scaling_factor`); of two that a  |
|                           | checkpoint may name since 0.18, the loader keeps the larger         |
| vLLM, SGLang              | `k_scale` and `v_scale`; equal ones are as good                     |

So one scale, from the larger of both maxima, is the default: it is served everywhere as trained.
"""

from dataclasses import dataclass
from typing import Any

from mqat.errors import UserError, nearest_hint
from mqat.quant.formats import FP8_E4M3, INT8_MIN128
from mqat.quant.granularity import PerTensor
from mqat.quant.scales import SCALE_DTYPES
from mqat.quant.scheme import TensorScheme

# INT8 codes saturate at -128, as the kernels' conversion does. FP8 scales lie on the bfloat16 grid,
# because compressed-tensors keeps them in the model's dtype.
_TENSORS = {
    "int8": TensorScheme(INT8_MIN128, PerTensor()),
    "fp8": TensorScheme(FP8_E4M3, PerTensor(), SCALE_DTYPES["bfloat16"]),
}
KV_CACHES = tuple(_TENSORS)
KV_SCALES = ("shared", "separate")


@dataclass(frozen=True)
class KvCacheScheme:
    """Quantization of one layer's cached keys (after RoPE) and values.

    Attributes:
        name: `int8` or `fp8`.
        is_shared: Keys and values have one scale.
    """

    name: str
    is_shared: bool = True

    @property
    def tensor(self) -> TensorScheme:
        """The same for keys and values: static, symmetric, per tensor."""
        return _TENSORS[self.name]

    @property
    def operands(self) -> dict[str, TensorScheme]:
        """Quantizer -> scheme: `kv`, or `key` and `value`."""
        return dict.fromkeys(("kv",) if self.is_shared else ("key", "value"), self.tensor)

    def scale_of(self, kind: str) -> str:
        """Quantizer of `key` or `value`."""
        return "kv" if self.is_shared else kind

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe form."""
        return {"kv_cache": self.name, "is_shared": self.is_shared}


def kv_cache_scheme(name: str, scales: str = "shared") -> KvCacheScheme:
    """The scheme of a configuration's words, one of `KV_CACHES` and one of `KV_SCALES`.

    `int8`: codes -128..127, step amax / 127; `fp8`: E4M3, step amax / 448.

    Raises:
        UserError: An unknown word; suggests the nearest.
    """
    if name not in _TENSORS:
        raise UserError(
            f"quantization.kv_cache={name!r} is unknown; {nearest_hint(name, KV_CACHES)}"
        )
    if scales not in KV_SCALES:
        hint = nearest_hint(scales, KV_SCALES)
        raise UserError(f"quantization.kv_cache_scales={scales!r} is unknown; {hint}")
    return KvCacheScheme(name, scales == "shared")

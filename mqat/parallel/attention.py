"""Core attention that computes with the keys and values a server's quantized cache would return.

Megatron calls core attention after RoPE, which is where TensorRT-LLM and vLLM write their caches.
Every token attends to quantized keys and values, its own included, as in generation; some prefill
kernels of TensorRT-LLM read the present prompt unquantized, which is at most more precise.

Heads are cut over TP and tokens over DP and CP, while a layer has one scale: calibration takes the
maximum over all of them. Under CP a rank quantizes its own tokens, before attention gathers them.
Queries and the attention's own products stay in the model's dtype.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mqat.parallel.quantized_module import QuantizedModule
from mqat.quant.kv_cache import KvCacheScheme
from mqat.quant.quantizer import Quantizer


class KvCacheAttention(QuantizedModule):
    """Any core attention behind key and value quantizers; what that attention takes is handed on.

    `quantized_name` is global, such as `decoder.layers.3.self_attention.core_attention`.
    """

    def __init__(
        self,
        *,
        attention: Callable[..., nn.Module],
        quantized_name: str,
        scheme: KvCacheScheme,
        config: Any,
        pg_collection: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.attention = attention(config=config, pg_collection=pg_collection, **kwargs)
        self.quantized_name = quantized_name
        self.tp_group = pg_collection.tp
        self.scheme = scheme
        self._quantizers = nn.ModuleDict(
            {
                kind: Quantizer(tensor, None, f"{quantized_name}.{kind}")
                for kind, tensor in scheme.operands.items()
            }
        )
        self.to(torch.cuda.current_device())

    @property
    def quantizers(self) -> dict[str, Quantizer]:
        """`kv`, or `key` and `value`."""
        return dict(self._quantizers.items())  # type: ignore[arg-type]

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """As the attention inside; `key` and `value` are [s, b, groups of this rank, d]."""
        key, value = self._cached("key", key), self._cached("value", value)
        context: Tensor = self.attention(query, key, value, *args, **kwargs)
        return context

    def _cached(self, kind: str, x: Tensor) -> Tensor:
        if self.is_calibrating:
            self.observe(self.scheme.scale_of(kind), x)
            return x
        return self.quantizers[self.scheme.scale_of(kind)](x)  # type: ignore[no-any-return]

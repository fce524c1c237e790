"""What the quality report measures while batches run: hooks on linears and on attentions with a cache.

A hook runs its module a second time, on the same arguments and without its quantizers; only real tokens
count (`QuantizedModule.token_mask`). What is merged over ranks later (`quality.py`): `sums` by SUM,
`maxima` by MAX.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mqat.parallel.attention import KvCacheAttention
from mqat.parallel.linear import QuantizedLinear, QuantRowParallelLinear
from mqat.parallel.quantized_module import QuantizedModule
from mqat.parallel.reduce import all_reduce_fused_
from mqat.quant.granularity import grouped_view
from mqat.quant.quantizer import Quantizer

SIGNAL, NOISE, CLIPPED, COUNT = range(4)  # places in a row of `sums`


@contextmanager
def _unquantized(module: QuantizedModule) -> Iterator[None]:
    quantizers = module.quantizers.values()
    enabled = [quantizer.is_enabled for quantizer in quantizers]
    try:
        for quantizer in quantizers:
            quantizer.is_enabled = False
        yield
    finally:
        for quantizer, was in zip(quantizers, enabled, strict=True):
            quantizer.is_enabled = was


def clipped(x: Tensor, quantizer: Quantizer) -> Tensor:
    """Number of elements beyond the last code (integers: by more than half a step), int64 ()."""
    if quantizer.scheme.is_dynamic:
        return torch.zeros((), dtype=torch.int64, device=x.device)
    scale, zero_point = quantizer.qparams(x)
    fmt, granularity = quantizer.scheme.format, quantizer.scheme.granularity
    groups, steps = grouped_view(x.detach().float(), scale, granularity)
    codes = groups / steps
    if zero_point is not None:
        codes = codes + grouped_view(x, zero_point, granularity)[1]
    slack = 0.0 if fmt.is_float else 0.5
    return ((codes < fmt.qmin - slack) | (codes > fmt.qmax + slack)).sum()


def operand_sums(x: Tensor, quantizer: Quantizer) -> Tensor:
    """float64 (4,): squares, squared errors, clipped elements, elements, of an operand."""
    x = x.detach()
    error = quantizer(x).double() - x.double()
    parts = (x.double().square().sum(), error.square().sum(), clipped(x, quantizer).double())
    return torch.stack([*parts, parts[0].new_tensor(x.numel())])


class SqnrHooks:
    """A linear or attention with quantizers under observation on this rank.

    Attributes:
        sums: Kind -> float64 (4,): signal, noise, clipped elements, elements. `output` counts what the
            module returns, against itself without any quantizer; other kinds are activations that pass a
            quantizer, before and behind it.
        maxima: Kind -> largest |x|, float32; `channels` of a linear's input: of each global channel [I],
            zero where others hold it.
        tokens: float64 (1,).
    """

    def __init__(self, module: QuantizedModule) -> None:
        self.module = module
        device = next(iter(module.quantizers.values())).scale.device
        kinds = dict.fromkeys(["output", *(kind for kind in module.quantizers if kind != "weight")])
        self.sums = {kind: torch.zeros(4, dtype=torch.float64, device=device) for kind in kinds}
        self.maxima = {kind: torch.zeros(1, device=device) for kind in self.sums}
        if isinstance(module, QuantizedLinear):
            cut = module.tp_group.size() if isinstance(module, QuantRowParallelLinear) else 1
            self.maxima["channels"] = torch.zeros(module.weight.shape[1] * cut, device=device)
        self.tokens = torch.zeros(1, dtype=torch.float64, device=device)
        self._is_inside = False

    def attach(self) -> Any:
        """Starts; what is returned is a context that ends it."""
        return self.module.register_forward_hook(self._hook, with_kwargs=True)

    def _hook(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._is_inside:
            return
        self._is_inside = True
        with torch.no_grad(), _unquantized(self.module):
            exact = _first(self.module(*args, **kwargs))
        self._is_inside = False
        self._compare_outputs(self._whole(_first(output)), self._whole(exact))
        if isinstance(self.module, KvCacheAttention):
            arguments = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            for kind in ("key", "value"):
                self._operand(self.module.scheme.scale_of(kind), arguments[kind])
            return
        self._channels(args[0])
        if "input" in self.module.quantizers:
            self._operand("input", args[0])

    def _whole(self, output: Tensor) -> Tensor:
        """Of all ranks: an expert's row-parallel linear leaves its sum to the layer."""
        module = self.module
        if module.expert_groups is None or not isinstance(module, QuantRowParallelLinear):
            return output
        whole = output.detach().clone()
        all_reduce_fused_([whole], dist.ReduceOp.SUM, module.tp_group)
        return whole

    def _compare_outputs(self, quantized: Tensor, exact: Tensor) -> None:
        quantized, exact = self.module.real_tokens(quantized), self.module.real_tokens(exact)
        sums, quantizer = self.sums["output"], self.module.quantizers.get("output")
        sums[SIGNAL] += exact.double().square().sum()
        sums[NOISE] += (quantized.double() - exact.double()).square().sum()
        if quantizer is not None:
            sums[CLIPPED] += clipped(exact, quantizer)
        sums[COUNT] += exact.numel()
        self.tokens += len(exact)
        self._largest("output", exact)

    def _operand(self, kind: str, x: Tensor) -> None:
        x = self.module.real_tokens(x)
        # Ranks that agree on a token's scale all have a part of that token: none waits in vain.
        if len(x):
            with torch.no_grad():
                self.sums[kind] += operand_sums(x, self.module.quantizers[kind])
            self._largest(kind, x)

    def _largest(self, kind: str, x: Tensor) -> None:
        if len(x):
            largest = self.maxima[kind]
            torch.maximum(largest, x.abs().amax().float(), out=largest)

    def _channels(self, x: Tensor) -> None:
        x = self.module.real_tokens(x)
        if not len(x):
            return
        own = x.abs().amax(dim=0).float()
        cut, whole = isinstance(self.module, QuantRowParallelLinear), self.maxima["channels"]
        start = own.numel() * self.module.tp_group.rank() if cut else 0
        place = whole[start : start + own.numel()]
        torch.maximum(place, own, out=place)


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found

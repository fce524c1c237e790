"""What every layer and linear of a Megatron model reads and writes, whole, one layer at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from torch import Tensor

from mqat.parallel.linear import QuantizedLinear
from mqat.parallel.quantized_module import unwrapped
from mqat.verify.agreement import add_noise

# Global number, input and output [b, s, hidden], name in the layer of a linear -> its input and output.
Watcher = Callable[[int, Tensor, Tensor, Mapping[str, tuple[Tensor, Tensor]]], None]


@contextmanager
def watched_layers(chunks: Sequence[Any], watch: Watcher) -> Iterator[None]:
    """Inside, the first forward pass through each layer is shown to `watch`.

    Tensors are gathered over tensor-parallel ranks, so that all of those call `watch`; biases are added.
    """
    handles, done = [], set[int]()
    for chunk in unwrapped(chunks):
        for layer in chunk.decoder.layers:
            handles += _watch_layer(layer, watch, done)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch_layer(layer: Any, watch: Watcher, done: set[int]) -> list[Any]:
    number, seen = layer.layer_number - 1, dict[str, tuple[Tensor, Tensor]]()
    cut = layer.config.sequence_parallel

    def whole(x: Tensor, *, features: bool = False, sequence: bool = False) -> Tensor:
        """[b, s, ...] of all ranks, from this rank's [s, b, ...]."""
        x = x.detach()
        x = gather_from_tensor_model_parallel_region(x) if features else x
        x = gather_from_sequence_parallel_region(x) if sequence and cut else x
        return x.transpose(0, 1).clone().cpu()  # Megatron's residual sum may be in place

    def of_linear(name: str, module: Any) -> Callable[..., None]:
        is_row = isinstance(module, RowParallelLinear)

        def hook(_: Any, given: tuple[Tensor, ...], result: tuple[Tensor, Tensor | None]) -> None:
            if number in done:
                return
            output = result[0] if result[1] is None else result[0] + result[1]
            output = whole(output, features=not is_row, sequence=is_row)
            if not is_row:  # ranks hold some of every part: gate 0, up 0, gate 1, up 1, ...
                pieces = output.unflatten(-1, (module.tp_group.size(), module.parts, -1))
                output = pieces.transpose(-3, -2).flatten(-3)
            seen[name] = whole(given[0], features=is_row, sequence=not is_row), output

        return hook

    def after(_: Any, args: tuple[Any, ...], options: dict[str, Any], result: Any) -> None:
        if number in done:
            return
        given = args[0] if args else options["hidden_states"]
        output = result[0] if isinstance(result, tuple) else result
        watch(number, whole(given, sequence=True), whole(output, sequence=True), dict(seen))
        seen.clear()
        done.add(number)

    # Experts see some tokens each, in another order: the layer's output tells of them.
    linears = [
        (n, m)
        for n, m in layer.named_modules()
        if isinstance(m, QuantizedLinear) and m.expert_groups is None
    ]
    handles = [module.register_forward_hook(of_linear(name, module)) for name, module in linears]
    return [*handles, layer.register_forward_hook(after, with_kwargs=True)]


@contextmanager
def noisy_linears(chunks: Sequence[Any], size: float) -> Iterator[None]:
    """Inside, every linear's input has relative noise of that size, other noise on every TP rank."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    generator = torch.Generator().manual_seed(rank)

    def hook(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (add_noise(args[0], size, generator), *args[1:])

    modules = [
        m for chunk in unwrapped(chunks) for m in chunk.modules() if isinstance(m, QuantizedLinear)
    ]
    handles = [module.register_forward_pre_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

"""The scope in which weights do not change, so that each is quantized once."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mqat.errors import UserError
from mqat.parallel.linear import quantized_linears
from mqat.parallel.step_weights import WeightCache


@contextmanager
def quantized_step(model: Any, *, for_backward: bool = True) -> Iterator[None]:
    """Put this around the forward-backward passes between two optimizer steps.

    Inside, each linear quantizes its weight at its first forward and keeps the codes; microbatches in
    flight and recomputed layers share them. Outside, every forward quantizes anew: slower, same values.

    Args:
        model: Chunk or list of chunks of this rank. Their weights must not change inside: the
            optimizer steps after the scope has ended.
        for_backward: False for evaluation: no masks are kept.

    Raises:
        UserError: Scopes may not nest, because the outer one could outlive an optimizer step.
    """
    linears = quantized_linears(model).values()
    for linear in linears:
        if linear.weight_cache is not None:
            raise UserError(
                f"{linear.quantized_name}: quantized_step is already open for this model. Close it "
                "before the next one: weights may change only between two scopes."
            )
    try:
        for linear in linears:
            linear.weight_cache = WeightCache(for_backward=for_backward)
        yield
    finally:
        for linear in linears:
            linear.weight_cache = None

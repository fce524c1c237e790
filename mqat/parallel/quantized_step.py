"""The scope in which weights do not change: each is quantized once, and its gradient masked once."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mqat.errors import UserError
from mqat.parallel.linear import quantized_linears


def _check_reduced(model: Any) -> None:
    """Refuses to mask gradients that Megatron's DDP is still adding up over ranks."""
    for chunk in model if isinstance(model, list | tuple) else [model]:
        for name in ("bucket_groups", "expert_parallel_bucket_groups"):
            if any(g.grad_reduce_handle is not None for g in getattr(chunk, name, ())):
                raise UserError(
                    "quantized_step: gradients are still being reduced (overlap_grad_reduce) where they "
                    "are to be masked. Let Megatron's schedule finish them (config."
                    "finalize_model_grads_func), or call finish_grad_sync() before the scope ends."
                )


@contextmanager
def quantized_step(
    model: Any, *, for_backward: bool = True, step: int | None = None
) -> Iterator[None]:
    """Put this around the forward-backward passes between two optimizer steps.

    Inside, each linear quantizes its weight at its first forward and keeps the codes; microbatches in
    flight and recomputed layers share them. Gradients of weights are summed as they come, and masked
    where the weight is clipped when the scope ends: before or after their reduction over data-parallel
    ranks, which all have the same mask, but before norms and optimizer see them. The mask is applied to
    all that `.grad` and `main_grad` hold by then: also to what came past the linear, such as the
    gradient of a regularisation term, and to what was there before the scope. Add such terms after it.
    (Weights shared with an embedding and Megatron-FSDP's are masked pass by pass instead.)
    Outside, every forward quantizes and every backward masks anew: slower, same values.

    Args:
        model: Chunk or list of chunks of this rank. Their weights must not change inside: the
            optimizer steps after the scope has ended.
        for_backward: False for evaluation: no masks are kept.
        step: Number of the optimizer step, for the noise of 8-bit gradients (`set_backward_`): with it a
            resumed run rounds as one that went through. None: steps are counted from the first.

    Raises:
        UserError: Scopes may not nest, because the outer one could outlive an optimizer step. Or DDP
            still reduces gradients when the scope ends.
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
            linear.step_weight.open(for_backward=for_backward)
            if linear.gradient_noise is not None and for_backward:
                linear.gradient_noise.begin_step(step)
            if linear.adapter is not None and for_backward:
                linear.adapter.begin_step(step)
        yield
        if for_backward:
            _check_reduced(model)
        for linear in linears:
            linear.step_weight.mask_gradient_(linear.weight)
    finally:
        for linear in linears:
            linear.step_weight.close()

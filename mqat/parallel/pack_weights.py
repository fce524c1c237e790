"""Turns a calibrated model into one that stores and multiplies low-precision weights. Cannot be undone.

For inference; or, where only weights are quantized, as the frozen backbone under adapters: gradients
pass to the inputs of its linears (`packed_weight.frozen_matmul`) and over ranks as Megatron's do. Lower
it before it is wrapped for data parallelism.

Such a model can also be compiled, layer by layer (`compile_layers_`). That is never done unasked: it
takes seconds to minutes for every new number of tokens.
"""

from dataclasses import replace
from typing import Any

import torch

from mqat.errors import UserError
from mqat.kernels.packed_weight import pack_weight
from mqat.parallel.linear import free_weight_, quantized_linears
from mqat.parallel.parameter_sync import gather_parameters
from mqat.parallel.quantized_module import unwrapped


def pack_weights_(model: Any, *, double_quantization: bool = False) -> tuple[int, int]:
    """Replaces the weights of all quantized linears by codes.

    The float weights are freed: they can no longer be trained or saved.

    Args:
        model: Chunk or list of chunks of this rank, with frozen scales.
        double_quantization: Keep the block maxima of NF4 in 8 bits as well, 4.127 bits per weight in
            all instead of 4.5. They move by at most half of 1/127 of the range of 256 of them, which
            depends on how a weight is cut over ranks.

    Returns:
        Bytes of those weights on this rank, before and after.

    Raises:
        UserError: A linear is not calibrated.
    """
    gather_parameters(model)
    before = after = 0
    linears = quantized_linears(model)
    for name, linear in linears.items():
        if not all(q.is_frozen for q in linear.quantizers.values()):
            raise UserError(f"{name}: has no scales yet; lower a calibrated checkpoint.")
    for linear in linears.values():
        quantizer = linear.weight_quantizer
        if quantizer is None:
            continue
        assert linear.scheme is not None, "a linear with a weight quantizer has a scheme"
        before += linear.weight.numel() * linear.weight.element_size()
        # The format in use: a checkpoint may stop on the way to fewer bits.
        scheme = replace(linear.scheme, weight=replace(quantizer.scheme, format=quantizer.format))
        scale, zero_point = quantizer.qparams(linear.weight)
        linear.packed_weight = pack_weight(
            linear.weight,
            scale.detach(),
            scheme,
            zero_point,
            double_quantization=double_quantization,
        )
        after += linear.packed_weight.num_bytes
        free_weight_(linear)
    return before, after


def compile_layers_(model: Any) -> None:
    """Has `torch.compile` translate every transformer layer when it first sees a shape; in place.

    Layers of the same shapes share their code. Calls into Megatron's collectives end a graph.

    Args:
        model: Chunk or list of chunks of this rank, lowered or not; for inference only.
    """
    # Megatron's linears and ours are called with four weights, and again for every sequence length; past
    # the limit, which has no spelling for one function, torch would run the rest uncompiled.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for chunk in unwrapped(model):
        chunk.requires_grad_(False)
        for layer in chunk.decoder.layers:
            layer.compile(dynamic=False)

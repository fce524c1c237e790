"""The training model with the steps of inputs that TensorRT-LLM serves: one for a layer's experts."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mqat.checkpoints.reader import CheckpointReader
from mqat.parallel.quantized_module import quantized_modules, unwrapped


@contextmanager
def shared_steps(chunks: Sequence[Any], checkpoint: CheckpointReader) -> Iterator[None]:
    """Inside, every expert's static input has the largest step of its layer's experts.

    What is left to compare with an export is then arithmetic. The steps are put back afterwards.

    Args:
        chunks: This rank's, whose scales are those of the checkpoint.
        checkpoint: With the scales of the experts on other ranks, too.
    """
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for name, module in quantized_modules(unwrapped(chunks)).items():
                quantizer = module.quantizers.get("input")
                if module.expert_groups is None or quantizer is None or quantizer.scheme.is_dynamic:
                    continue
                place, _, linear = name.rsplit(".", 2)
                experts = range(checkpoint.model.num_experts)
                steps = [
                    checkpoint.frozen(f"{place}.{number}.{linear}", "input", "scale")
                    for number in experts
                ]
                kept.append((quantizer.scale, quantizer.scale.detach().clone()))
                quantizer.scale.copy_(torch.stack(steps).amax(dim=0))
        yield
    finally:
        with torch.no_grad():
            for scale, value in kept:
                scale.copy_(value)

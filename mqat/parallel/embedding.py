"""A vocabulary table whose rows are looked up on their grid.

Only the rows of a batch are quantized, after the lookup: the same numbers as from a quantized table,
without passing over the whole of it in every microbatch. A row has its own scales (channel or groups
along the hidden dimension), so vocabulary padding and the cut of rows over TP change none.
"""

from typing import Any

import torch.nn.functional as F  # noqa: N812
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

from mqat.parallel.quantized_module import QuantizedModule
from mqat.quant.functional import fake_quantize
from mqat.quant.quantizer import Quantizer
from mqat.quant.scheme import LinearScheme


class QuantVocabParallelEmbedding(QuantizedModule, VocabParallelEmbedding):  # type: ignore[misc]
    """`VocabParallelEmbedding` with a quantized weight; takes the same arguments, and two more.

    Args:
        *args: As for Megatron's `VocabParallelEmbedding`.
        quantized_name: Global name.
        scheme: Only its weight counts: a lookup has no other operand (`specs.policy` sees to it).
        **kwargs: As for Megatron's `VocabParallelEmbedding`.
    """

    vocab_start_index: int
    reduce_scatter_embeddings: bool

    def __init__(
        self, *args: Any, quantized_name: str, scheme: LinearScheme, **kwargs: Any
    ) -> None:
        VocabParallelEmbedding.__init__(self, *args, **kwargs)
        assert scheme.weight is not None and list(scheme.operands) == ["weight"], quantized_name
        self.quantized_name = quantized_name
        shape = tuple(self.weight.shape)
        self.weight_quantizer = Quantizer(scheme.weight, shape, f"{quantized_name}.weight")
        self.to(self.weight.device)

    @property
    def quantizers(self) -> dict[str, Quantizer]:
        """`weight`."""
        return {"weight": self.weight_quantizer}

    def forward(self, input_: Tensor) -> Tensor:
        """Rows of tokens [b, s] on their grid, [b, s, H]; cut along s under sequence parallelism."""
        quantizer, scheme = self.weight_quantizer, self.weight_quantizer.scheme
        if self.is_calibrating or not (quantizer.is_frozen and quantizer.is_enabled):
            output: Tensor = VocabParallelEmbedding.forward(self, input_)
            return output
        local = input_ - self.vocab_start_index
        elsewhere = (local < 0) | (local >= self.weight.shape[0])
        index = local.masked_fill(elsewhere, 0)
        zero_point = None if quantizer.zero_point is None else quantizer.zero_point[index]
        rows = fake_quantize(
            F.embedding(index, self.weight),
            quantizer.scale[index],
            scheme.format,
            scheme.granularity,
            zero_point=zero_point,
            ste_clip_range=scheme.ste_clip_range,
        ).masked_fill(elsewhere[..., None], 0)
        if self.reduce_scatter_embeddings:
            rows = rows.transpose(0, 1).contiguous()
            return reduce_scatter_to_sequence_parallel_region(rows, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(rows, group=self.tp_group)

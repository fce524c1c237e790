"""The rows and columns of a trained linear that a served module holds, read and quantized in chunks."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mqat.checkpoints.reader import CheckpointReader
from mqat.export.reshard import Rows, count, row_chunks
from mqat.models.structure import Linear, in_layer, quantizer_key
from mqat.quant.functional import dequantize, quantize
from mqat.quant.granularity import PerGroup, PerTensor
from mqat.quant.scheme import TensorScheme


@dataclass(frozen=True)
class ServedLinear:
    """Rows and columns of a trained linear that form one module of the exported model.

    Scales are always the frozen ones, never recomputed.

    Attributes:
        reader: The checkpoint.
        layer: Global number.
        linear: Row of the table.
        rows: Of the trained weight, in served order.
        cols: Of the trained weight, with start and stop.
        dtype: Of unquantized tensors.
    """

    reader: CheckpointReader
    layer: int
    linear: Linear
    rows: Rows
    cols: slice
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """Global name in the checkpoint."""
        return in_layer(self.layer, self.linear.name)

    @property
    def has_bias(self) -> bool:
        """Whether the trained linear has a bias."""
        return self.linear.name in self.reader.model.biases

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the served weight."""
        return count(self.rows), self.cols.stop - self.cols.start

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Of the served weight's scales."""
        return self.weight_scheme.granularity.scale_shape(self.shape)

    @property
    def weight_scheme(self) -> TensorScheme:
        """How the weight is quantized."""
        scheme = self.reader.layers[self.name].weight
        assert scheme is not None, self.name
        return scheme

    def _weight(self, rows: Rows) -> Tensor:
        width = self.cols.stop - self.cols.start
        key, lead = self._place(self.linear.key)
        spans = [
            self.reader.view(key, (*lead, span, self.cols)).reshape(-1, width) for span in rows
        ]
        return spans[0] if len(spans) == 1 else torch.cat(spans)

    def _place(self, key: str) -> tuple[str, tuple[slice, ...]]:
        key, lead = self.reader.model.place(key, self.layer)
        return key, (*lead, *self.linear.stored_at)

    def bias(self) -> Tensor:
        """The bias of the served rows; whole where columns are cut."""
        key, lead = self._place(self.linear.bias_key)
        return torch.cat([self.reader.read(key, (*lead, span)).reshape(-1) for span in self.rows])

    def weights(self) -> Iterator[Tensor]:
        """The trained weight, chunk by chunk."""
        return (self._weight(rows) for rows in row_chunks(self.rows, self.shape[1]))

    def columns(self) -> Iterator[Tensor]:
        """The trained weight, some columns at a time."""
        for (cols,) in row_chunks([self.cols], self.shape[0]):
            yield replace(self, cols=cols)._weight(self.rows)

    def scale(self, rows: Rows | None = None, *, tensor: str = "scale") -> Tensor:
        """The frozen scale (or `zero_point`) of some trained rows, in its granularity's shape."""
        key, rows = self._key("weight", tensor), self.rows if rows is None else rows
        granularity = self.weight_scheme.granularity
        if isinstance(granularity, PerTensor):
            return self.reader.read(key)
        columns: tuple[slice, ...] = ()
        if isinstance(granularity, PerGroup):
            size = granularity.size
            columns = (slice(self.cols.start // size, -(-self.cols.stop // size)),)
        return torch.cat([self.reader.read(key, (span, *columns)) for span in rows])

    def zero_point(self, rows: Rows | None = None) -> Tensor | None:
        """The frozen zero points, int32, shaped like `scale`; None if symmetric."""
        if not self.weight_scheme.is_asymmetric:
            return None
        return self.scale(rows, tensor="zero_point")

    def codes(self) -> Iterator[Tensor]:
        """Codes of the trained weight on its frozen grid, chunk by chunk."""
        scheme = self.weight_scheme
        for rows in row_chunks(self.rows, self.shape[1]):
            yield quantize(
                self._weight(rows), self.scale(rows), scheme.format, scheme.granularity,
                zero_point=self.zero_point(rows),
            )  # fmt: skip

    def values(self) -> Iterator[Tensor]:
        """What training multiplied by, rounded once to the model's dtype."""
        scheme = self.weight_scheme
        for rows, codes in zip(row_chunks(self.rows, self.shape[1]), self.codes(), strict=True):
            yield dequantize(
                codes, self.scale(rows), scheme.granularity, self.dtype,
                zero_point=self.zero_point(rows), fmt=scheme.format,
            )  # fmt: skip

    def whole(self, operand: str, tensor: str) -> Tensor:
        """A frozen tensor of the whole trained linear, of which this may hold some rows only."""
        return self.reader.read(self._key(operand, tensor))

    def _key(self, operand: str, tensor: str) -> str:
        return quantizer_key(self.name, operand, tensor)

"""What served tensors of a linear are made of: codes, packed codes, scales.

A served format is a table from tensor names to the functions at the end of this file; a further
format is a further table (`trtllm.FORMATS`, `compressed_tensors.FORMATS`), and at most a function.
Weights pass through in blocks of rows; scales are always the frozen ones, never recomputed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mqat.checkpoints.reader import CheckpointReader
from mqat.errors import UserError
from mqat.export.reshard import Rows, count, row_blocks
from mqat.export.stream import TensorPlan
from mqat.export.words import pack_words
from mqat.quant.functional import dequantize, quantize
from mqat.quant.granularity import PerGroup, PerTensor
from mqat.quant.packing import pack_int4, pack_nibbles
from mqat.quant.scales import block_scales
from mqat.quant.scheme import TensorScheme


@dataclass(frozen=True)
class ServedLinear:
    """Rows and columns of a trained linear that form one module of the exported model.

    Attributes:
        reader: The checkpoint.
        layer: Global number.
        linear: `self_attention.linear_qkv`, ...
        rows: Of the trained weight, in served order.
        cols: Of the trained weight, with start and stop.
        dtype: Of unquantized tensors.
    """

    reader: CheckpointReader
    layer: int
    linear: str
    rows: Rows
    cols: slice
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """Global name in the checkpoint."""
        return f"decoder.layers.{self.layer}.{self.linear}"

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the served weight."""
        return count(self.rows), self.cols.stop - self.cols.start

    @property
    def weight_scheme(self) -> TensorScheme:
        """How the weight is quantized."""
        scheme = self.reader.layers[self.name].weight
        assert scheme is not None, self.name
        return scheme

    def _weight(self, rows: Rows) -> Tensor:
        key, lead = f"decoder.layers.{self.linear}.weight", slice(self.layer, self.layer + 1)
        parts = [self.reader.view(key, (lead, part, self.cols))[0] for part in rows]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def weights(self) -> Iterator[Tensor]:
        """The trained weight, block by block."""
        return (self._weight(rows) for rows in row_blocks(self.rows, self.shape[1]))

    def scale(self, rows: Rows | None = None, *, part: str = "scale") -> Tensor:
        """The frozen scale of some of the rows (default: all), in the shape of its granularity.

        Args:
            rows: Of the trained weight.
            part: Or `zero_point`, which is shaped alike.
        """
        key, rows = f"quantizers.{self.name}.weight_{part}", self.rows if rows is None else rows
        granularity = self.weight_scheme.granularity
        if isinstance(granularity, PerTensor):
            return self.reader.read(key)
        columns: tuple[slice, ...] = ()
        if isinstance(granularity, PerGroup):
            size = granularity.size
            columns = (slice(self.cols.start // size, -(-self.cols.stop // size)),)
        return torch.cat([self.reader.read(key, (span, *columns)) for span in rows])

    def zero_point(self, rows: Rows | None = None) -> Tensor | None:
        """The frozen zero points, int32, shaped like `scale`; None where zero is zero."""
        if not self.weight_scheme.is_asymmetric:
            return None
        return self.scale(rows, part="zero_point")

    def codes(self) -> Iterator[Tensor]:
        """Codes of the trained weight on its frozen grid, block by block."""
        scheme = self.weight_scheme
        for rows in row_blocks(self.rows, self.shape[1]):
            yield quantize(
                self._weight(rows), self.scale(rows), scheme.format, scheme.granularity,
                zero_point=self.zero_point(rows),
            )  # fmt: skip

    def values(self) -> Iterator[Tensor]:
        """What training multiplied by, rounded once to the model's dtype."""
        scheme = self.weight_scheme
        for rows, codes in zip(row_blocks(self.rows, self.shape[1]), self.codes(), strict=True):
            yield dequantize(
                codes, self.scale(rows), scheme.granularity, self.dtype,
                zero_point=self.zero_point(rows), fmt=scheme.format,
            )  # fmt: skip

    def whole_scale(self) -> Tensor:
        """The frozen scale of the whole trained weight, of which this may be a part."""
        return self.reader.read(f"quantizers.{self.name}.weight_scale")

    def read_global_scale(self, kind: str = "weight") -> Tensor:
        """The upper one of two levels, float32 (1,); `kind`: `weight` or `input`."""
        return self.reader.read(f"quantizers.{self.name}.{kind}_global_scale")

    def read_input_scale(self) -> Tensor:
        """The frozen scale of the input, float32 (1,)."""
        return self.reader.read(f"quantizers.{self.name}.input_scale")


@dataclass(frozen=True)
class Content:
    """A served tensor without its name."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[Tensor]]

    def named(self, name: str) -> TensorPlan:
        """With its name in the file."""
        return TensorPlan(name, self.dtype, self.shape, self.blocks)


Maker = Callable[[ServedLinear], Content]


def with_bias(part: ServedLinear, tensors: Mapping[str, Maker]) -> Mapping[str, Maker]:
    """The table of a format, and the bias where the linear has one: in every format the same."""
    return {**tensors, "bias": bias} if part.linear in part.reader.model.biases else tensors


def bias(part: ServedLinear) -> Content:
    """The bias of the served rows, in the model's dtype; whole where columns are cut."""
    key, layer = f"decoder.layers.{part.linear}.bias", slice(part.layer, part.layer + 1)

    def make() -> Tensor:
        rows = [part.reader.read(key, (layer, span))[0] for span in part.rows]
        return torch.cat(rows).to(part.dtype)

    return _lazily(part.dtype, part.shape[:1], make)


def unquantized(part: ServedLinear) -> Content:
    """The trained weight in the model's dtype."""
    return Content(part.dtype, part.shape, lambda: (w.to(part.dtype) for w in part.weights()))


def dequantized(part: ServedLinear) -> Content:
    """The weight on its grid, in the model's dtype."""
    return Content(part.dtype, part.shape, part.values)


def codes(part: ServedLinear) -> Content:
    """One code per element."""
    return Content(part.weight_scheme.format.storage_dtype, part.shape, part.codes)


def row_pairs(part: ServedLinear) -> Content:
    """Two INT4 codes of neighbouring rows in a byte."""
    out, width = part.shape
    return Content(torch.int8, (out // 2, width), lambda: map(pack_int4, part.codes()))


def row_pairs_as_bytes(part: ServedLinear) -> Content:
    """The same bits, as unsigned bytes."""
    out, width = part.shape
    return Content(
        torch.uint8,
        (out // 2, width),
        lambda: (pack_int4(block).view(torch.uint8) for block in part.codes()),
    )


def column_pairs(part: ServedLinear) -> Content:
    """Two FP4 codes of neighbouring columns in a byte."""
    out, width = part.shape
    return Content(torch.uint8, (out, width // 2), lambda: map(pack_nibbles, part.codes()))


def _signed(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes or zero points, moved so that the range is that of signed ones; int8."""
    return (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def words(part: ServedLinear) -> Content:
    """Integer codes of neighbouring columns in a 32-bit word."""
    (out, width), fmt = part.shape, part.weight_scheme.format

    def blocks() -> Iterator[Tensor]:
        for block in part.codes():
            signed = _signed(block, fmt.bits) if fmt.is_unsigned else block
            yield pack_words(signed, fmt.bits)

    return Content(torch.int32, (out, -(-width * fmt.bits // 32)), blocks)


def zero_words(part: ServedLinear) -> Content:
    """Zero points of neighbouring rows in a 32-bit word, moved like the codes of `words`."""
    bits = part.weight_scheme.format.bits
    out, groups = _scale_shape(part)

    def make() -> Tensor:
        zero = part.zero_point()
        assert zero is not None, "only asymmetric weights have zero points"
        return pack_words(_signed(zero, bits).t().contiguous(), bits).t().contiguous()

    return _lazily(torch.int32, (-(-out * bits // 32), groups), make)


def _lazily(dtype: torch.dtype, shape: tuple[int, ...], make: Callable[[], Tensor]) -> Content:
    """A tensor that is small enough to be made at once, when its turn comes."""
    return Content(dtype, shape, lambda: iter([make().reshape(shape)]))


def _scale_shape(part: ServedLinear) -> tuple[int, ...]:
    return part.weight_scheme.granularity.scale_shape(part.shape)


def frozen_scale(part: ServedLinear) -> Content:
    """Weight scale, float32, in the shape of its granularity."""
    return _lazily(torch.float32, _scale_shape(part), part.scale)


def column_scale(part: ServedLinear) -> Content:
    """Weight scale per output channel, float32 (out, 1)."""
    return _lazily(torch.float32, (part.shape[0], 1), part.scale)


def scalar_scale(part: ServedLinear) -> Content:
    """Weight scale per tensor, float32 ()."""
    return _lazily(torch.float32, (), part.scale)


def model_scale(part: ServedLinear) -> Content:
    """Weight scale in the model's dtype, in which servers keep it; it must lose nothing."""

    def exact() -> Tensor:
        scale = part.scale()
        served = scale.to(part.dtype)
        if not torch.equal(served.float(), scale):
            raise UserError(
                f"{part.name}: weight scales do not fit export.dtype={part.dtype} exactly "
                f"(smallest {scale.min():.3g}); use bfloat16 or float32."
            )
        return served

    return _lazily(part.dtype, _scale_shape(part), exact)


def input_scale(part: ServedLinear) -> Content:
    """Input scale, float32 (1,)."""
    return _lazily(torch.float32, (1,), part.read_input_scale)


def scalar_input_scale(part: ServedLinear) -> Content:
    """Input scale, float32 ()."""
    return _lazily(torch.float32, (), part.read_input_scale)


def ones(part: ServedLinear) -> Content:
    """Factor of each input channel, in the model's dtype: smoothing is folded into the weights."""
    width = part.shape[1]
    return _lazily(part.dtype, (width,), lambda: torch.ones(width, dtype=part.dtype))


def full_shape(part: ServedLinear) -> Content:
    """Shape of the unpacked weight, int64 (2,)."""
    return _lazily(torch.int64, (2,), lambda: torch.tensor(part.shape))


def block_scale(part: ServedLinear) -> Content:
    """Lower one of two levels of weight scales, E4M3."""
    return _lazily(
        torch.float8_e4m3fn,
        _scale_shape(part),
        lambda: block_scales(part.scale(), part.read_global_scale()),
    )


def global_scale(part: ServedLinear) -> Content:
    """Upper level of weight scales, float32 (1,)."""
    return _lazily(torch.float32, (1,), part.read_global_scale)


def scalar_global_scale(part: ServedLinear) -> Content:
    """Upper level of weight scales, float32 ()."""
    return _lazily(torch.float32, (), part.read_global_scale)


def inverse_global_scale(part: ServedLinear) -> Content:
    """Reciprocal of the upper level of weight scales, float32 (1,)."""
    return _lazily(torch.float32, (1,), lambda: part.read_global_scale().reciprocal())


def input_global_scale(part: ServedLinear) -> Content:
    """Upper level of input scales, float32 (1,)."""
    return _lazily(torch.float32, (1,), lambda: part.read_global_scale("input"))


def scalar_input_global_scale(part: ServedLinear) -> Content:
    """Upper level of input scales, float32 ()."""
    return _lazily(torch.float32, (), lambda: part.read_global_scale("input"))


def inverse_input_global_scale(part: ServedLinear) -> Content:
    """Reciprocal of the upper level of input scales, float32 (1,)."""
    return _lazily(torch.float32, (1,), lambda: part.read_global_scale("input").reciprocal())


def _fp8_range_scale(part: ServedLinear) -> Tensor:
    """What brings an INT4 weight into E4M3's range: a power of two, so that dividing by it is exact.

    Any factor of at least max|W| / 448 will do for W4A8 kernels; codes reach -8.
    """
    mantissa, exponent = torch.frexp(8 * part.whole_scale().amax().reshape(1) / 448)
    return torch.ldexp(torch.ones(1), exponent - (mantissa == 0.5).int())


def fp8_range_scale(part: ServedLinear) -> Content:
    """Second scale of W4A8 weights, float32 (1,): the same for all parts of a trained weight."""
    return _lazily(torch.float32, (1,), lambda: _fp8_range_scale(part))


def scalar_fp8_range_scale(part: ServedLinear) -> Content:
    """The same, float32 ()."""
    return _lazily(torch.float32, (), lambda: _fp8_range_scale(part))

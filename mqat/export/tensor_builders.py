"""One function for every kind of tensor that servers keep of a linear: codes, packed codes, scales.

A form (`forms.Form`) maps names of tensors to these functions, whose plans have none yet. Scales
multiply when dequantizing.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from mqat.errors import UserError
from mqat.export.served_linear import ServedLinear
from mqat.export.stream import TensorPlan
from mqat.export.words import pack_words
from mqat.quant.packing import pack_int4, pack_nibbles
from mqat.quant.scales import block_scales

TensorBuilder = Callable[[ServedLinear], TensorPlan]
# Suffix of a tensor's name, after its module's -> builder.
TensorBuilders = Mapping[str, TensorBuilder]


def _small(dtype: torch.dtype, shape: tuple[int, ...], make: Callable[[], Tensor]) -> TensorPlan:
    """A tensor that is small enough to be made at once, when its turn comes."""
    return TensorPlan(dtype, shape, lambda: iter([make().reshape(shape)]))


def bias(served: ServedLinear) -> TensorPlan:
    """The bias in the model's dtype, whatever the form of the weight."""
    return _small(served.dtype, served.shape[:1], lambda: served.bias().to(served.dtype))


def unquantized(served: ServedLinear) -> TensorPlan:
    """The trained weight in the model's dtype."""
    dtype = served.dtype
    return TensorPlan(dtype, served.shape, lambda: (w.to(dtype) for w in served.weights()))


def transposed(served: ServedLinear) -> TensorPlan:
    """The same as (in, out), some columns of the trained weight at a time."""
    dtype = served.dtype
    return TensorPlan(
        dtype, served.shape[::-1], lambda: (w.t().to(dtype) for w in served.columns())
    )


def dequantized(served: ServedLinear) -> TensorPlan:
    """The weight on its grid, in the model's dtype."""
    return TensorPlan(served.dtype, served.shape, served.values)


def codes(served: ServedLinear) -> TensorPlan:
    """One code per element."""
    return TensorPlan(served.weight_scheme.format.storage_dtype, served.shape, served.codes)


def row_pairs(served: ServedLinear) -> TensorPlan:
    """Two INT4 codes of neighbouring rows in a byte, int8 (out / 2, in)."""
    out, width = served.shape
    return TensorPlan(torch.int8, (out // 2, width), lambda: map(pack_int4, served.codes()))


def row_pairs_as_bytes(served: ServedLinear) -> TensorPlan:
    """The same bits, as unsigned bytes."""
    packed = row_pairs(served)
    return TensorPlan(
        torch.uint8, packed.shape, lambda: (chunk.view(torch.uint8) for chunk in packed.chunks())
    )


def column_pairs(served: ServedLinear) -> TensorPlan:
    """Two FP4 codes of neighbouring columns in a byte, uint8 (out, in / 2)."""
    out, width = served.shape
    return TensorPlan(torch.uint8, (out, width // 2), lambda: map(pack_nibbles, served.codes()))


def _signed(unsigned: Tensor, bits: int) -> Tensor:
    """Unsigned codes or zero points, moved so that the range is that of signed ones; int8."""
    return (unsigned.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def words(served: ServedLinear) -> TensorPlan:
    """Integer codes of neighbouring columns in a 32-bit word."""
    (out, width), fmt = served.shape, served.weight_scheme.format

    def chunks() -> Iterator[Tensor]:
        for chunk in served.codes():
            yield pack_words(_signed(chunk, fmt.bits) if fmt.is_unsigned else chunk, fmt.bits)

    return TensorPlan(torch.int32, (out, -(-width * fmt.bits // 32)), chunks)


def zero_words(served: ServedLinear) -> TensorPlan:
    """Zero points of neighbouring rows in a 32-bit word, moved like the codes of `words`."""
    bits = served.weight_scheme.format.bits
    out, groups = served.scale_shape

    def make() -> Tensor:
        zero = served.zero_point()
        assert zero is not None, "only asymmetric weights have zero points"
        return pack_words(_signed(zero, bits).t().contiguous(), bits).t().contiguous()

    return _small(torch.int32, (-(-out * bits // 32), groups), make)


def frozen_scale(served: ServedLinear) -> TensorPlan:
    """Weight scale, float32, in the shape of its granularity."""
    return _small(torch.float32, served.scale_shape, served.scale)


def column_scale(served: ServedLinear) -> TensorPlan:
    """Weight scale per output channel, float32 (out, 1)."""
    return _small(torch.float32, (served.shape[0], 1), served.scale)


def model_scale(served: ServedLinear) -> TensorPlan:
    """Weight scale in the model's dtype, in which servers keep it; it must lose nothing."""
    return _small(served.dtype, served.scale_shape, lambda: _exact(served, served.scale()))


def cast_scale(served: ServedLinear) -> TensorPlan:
    """Weight scale, float32 (1,), which an engine casts to the model's dtype; it must lose nothing."""
    scale = served.scale
    return _small(torch.float32, served.scale_shape, lambda: _exact(served, scale()).float())


def cast_input_scale(served: ServedLinear) -> TensorPlan:
    """The same of the input."""
    whole = served.whole
    return _small(torch.float32, (1,), lambda: _exact(served, whole("input", "scale")).float())


def _exact(served: ServedLinear, scale: Tensor) -> Tensor:
    """`scale` in the model's dtype; a UserError where that rounds it."""
    rounded = scale.to(served.dtype)
    if not torch.equal(rounded.float(), scale):
        raise UserError(
            f"{served.name}: scales do not fit export.dtype={served.dtype} exactly (smallest "
            f"{scale.min():.3g}); use bfloat16 or float32."
        )
    return rounded


def e4m3_scale(served: ServedLinear) -> TensorPlan:
    """Lower one of two levels of weight scales, E4M3, in the shape of its granularity."""
    return _small(
        torch.float8_e4m3fn,
        served.scale_shape,
        lambda: block_scales(served.scale(), served.whole("weight", "global_scale")),
    )


def _whole(operand: str, tensor: str) -> TensorBuilder:
    """A builder of the one frozen number of a whole linear, float32 (1,)."""
    return lambda served: _small(torch.float32, (1,), lambda: served.whole(operand, tensor))


input_scale = _whole("input", "scale")
# Upper ones of two levels.
global_scale, input_global_scale = _whole("weight", "global_scale"), _whole("input", "global_scale")


def fp8_range_scale(served: ServedLinear) -> TensorPlan:
    """Second scale of W4A8 weights, float32 (1,): the same for all parts of a trained weight.

    It brings an INT4 weight into E4M3's range. Any factor of at least max|W| / 448 will do for W4A8
    kernels, and codes reach -8; a power of two, so that dividing by it is exact.
    """

    def make() -> Tensor:
        largest = 8 * served.whole("weight", "scale").amax().reshape(1)
        mantissa, exponent = torch.frexp(largest / 448)
        return torch.ldexp(torch.ones(1), exponent - (mantissa == 0.5).int())

    return _small(torch.float32, (1,), make)


def scalar(build: TensorBuilder) -> TensorBuilder:
    """A builder of the same single number with shape ()."""

    def reshaped(served: ServedLinear) -> TensorPlan:
        one = build(served)
        return _small(one.dtype, (), lambda: next(one.chunks()))

    return reshaped


def inverse(build: TensorBuilder) -> TensorBuilder:
    """A builder of the reciprocals of a small tensor."""

    def inverted(served: ServedLinear) -> TensorPlan:
        small = build(served)
        return _small(small.dtype, small.shape, lambda: next(small.chunks()).reciprocal())

    return inverted


def ones(served: ServedLinear) -> TensorPlan:
    """Factor of each input channel, in the model's dtype: smoothing is folded into the weights."""
    width = served.shape[1]
    return _small(served.dtype, (width,), lambda: torch.ones(width, dtype=served.dtype))


def full_shape(served: ServedLinear) -> TensorPlan:
    """Shape of the unpacked weight, int64 (2,)."""
    return _small(torch.int64, (2,), lambda: torch.tensor(served.shape))

"""A packed weight of a frozen backbone, in units that no parallel layout cuts.

A weight [O, I] on a rank is a row of units, along the dimension that tensor parallelism cuts; each is
quantized and stored by itself, so that one layout's units are another's. NF4 has blocks of 64 with
doubly quantized maxima (`packed_nf4.py`), groups of 4-bit integers their frozen scales.

| tensor       | of NF4                        | of integers, with G groups in a row           |
|--------------|-------------------------------|-----------------------------------------------|
| `codes`      | uint8 [units, o * i / 2]      | uint8 [units, o, i / 2]                       |
| `scale`      | int8 [units, blocks]          | [units, o, G], float32 or bfloat16            |
| `steps`      | float32 [units, blocks / 256] |                                               |
| `mean`       | float32 [units]               |                                               |
| `zero_point` |                               | int32 [units, o, G], if asymmetric            |
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mqat.errors import UserError
from mqat.kernels.packed_nf4 import BLOCK, SCALE_BLOCK, DoubleScales, Nf4Weight, nf4_quantize
from mqat.kernels.packed_weight import DecodedCodes, plain_codes
from mqat.kernels.stored import FloatProduct
from mqat.quant.formats import NF4
from mqat.quant.functional import quantize
from mqat.quant.granularity import PerGroup
from mqat.quant.scheme import TensorScheme


def is_double_nf4(scheme: TensorScheme) -> bool:
    """Whether a weight is stored in NF4's own form."""
    return scheme.format == NF4 and scheme.granularity == PerGroup(BLOCK)


@dataclass(frozen=True)
class FrozenCodes(FloatProduct):
    """The table above.

    Attributes:
        tensors: By name.
        scheme: Of the weight.
        unit: (o, i), the shape of a unit.
        axis: Along which units lie: 0 rows, 1 columns.
    """

    tensors: Mapping[str, Tensor]
    scheme: TensorScheme
    unit: tuple[int, int]
    axis: int

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def decode(self, dtype: torch.dtype) -> Tensor:
        """As `FloatProduct.decode`."""
        return torch.cat([unit.decode(dtype) for unit in self._units()], dim=self.axis)

    def _units(self) -> Iterator[FloatProduct]:
        t = self.tensors
        for number in range(len(t["codes"])):
            if is_double_nf4(self.scheme):
                scales = DoubleScales(t["scale"][number], t["steps"][number], t["mean"][number])
                yield Nf4Weight(t["codes"][number], scales, self.unit)
                continue
            zero = t["zero_point"][number] if "zero_point" in t else None
            scale = t["scale"][number].float()
            yield DecodedCodes(t["codes"][number], scale, zero, self.scheme, self.unit)


def check_packable(name: str, scheme: TensorScheme) -> None:
    """Refuses weights that are not stored in this form.

    Raises:
        UserError: Names the linear.
    """
    is_groups = isinstance(scheme.granularity, PerGroup) and scheme.format.bits == 4
    is_integer = not scheme.format.is_float
    if not (is_double_nf4(scheme) or (is_groups and is_integer)):
        raise UserError(
            f"{name}: {scheme.format.name} of {scheme.granularity} is not stored packed under adapters; "
            "choose nf4, int4 or int4_awq, or leave out quantization.compress."
        )


def frozen_shapes(scheme: TensorScheme, unit: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Shapes of a unit's tensors."""
    rows, columns = unit
    if is_double_nf4(scheme):
        blocks = rows * columns // BLOCK
        return {
            "codes": (rows * columns // 2,), "scale": (blocks,),
            "steps": (-(-blocks // SCALE_BLOCK),), "mean": (),
        }  # fmt: skip
    return {"codes": (rows, columns // 2), **scheme.frozen_shapes(unit)}


@torch.no_grad()
def freeze_weight(
    weight: Tensor,
    scheme: TensorScheme,
    qparams: Mapping[str, Tensor],
    unit: tuple[int, int],
    axis: int,
) -> FrozenCodes:
    """Quantizes and packs a weight [O, I], unit by unit.

    Args:
        weight: On this rank.
        scheme: NF4's, or groups of 4-bit integers (`check_packable`).
        qparams: `scale` and, if asymmetric, `zero_point`, of the whole; NF4 makes its own.
        unit: Shape that divides the weight's along `axis`, and equals it along the other.
        axis: Where units lie.
    """
    found: dict[str, list[Tensor]] = {}
    size = unit[axis]
    for number in range(weight.shape[axis] // size):
        piece = weight.narrow(axis, number * size, size)
        if is_double_nf4(scheme):
            packed = nf4_quantize(piece)
            scales = packed.scales
            assert isinstance(scales, DoubleScales), "double quantization is the default"
            tensors = {
                "codes": packed.packed, "scale": scales.codes, "steps": scales.steps,
                "mean": scales.mean,
            }  # fmt: skip
        else:
            own = {name: _part(x, scheme, number, size, axis) for name, x in qparams.items()}
            zero = own.get("zero_point")
            codes = quantize(
                piece, own["scale"], scheme.format, scheme.granularity, zero_point=zero
            )
            stored = plain_codes(codes, own["scale"], zero, scheme)
            tensors = {"codes": stored.codes, "scale": own["scale"].to(scheme.scale_dtype)}
            tensors |= {} if zero is None else {"zero_point": zero}
        for name, tensor in tensors.items():
            found.setdefault(name, []).append(tensor)
    return FrozenCodes({n: torch.stack(x) for n, x in found.items()}, scheme, unit, axis)


def _part(qparam: Tensor, scheme: TensorScheme, number: int, size: int, axis: int) -> Tensor:
    """What of a scale or zero point (O, G) belongs to a unit."""
    assert isinstance(scheme.granularity, PerGroup), "check_packable()"
    size //= scheme.granularity.size if axis == 1 else 1
    return qparam.narrow(axis, number * size, size)

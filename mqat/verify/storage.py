"""How a linear is stored in an exported directory, in words that hold for every format.

| tensor               | shape, unpacked   | meaning                                                  |
|----------------------|-------------------|----------------------------------------------------------|
| `weight`             | [O, I]            | unquantized, in the model's dtype                        |
| `codes`              | [O, I]            | integers, or floats of 8 or 4 bits                       |
| `scale`              | by granularity    | dequantization step; of two levels, the lower one        |
| `zero_point`         | like `scale`      | code of zero                                             |
| `global_scale`       | (1,)              | upper level of two                                       |
| `range_scale`        | (1,)              | brings INT4 weights into the range of FP8                |
| `shape`              | (2,)              | [O, I] of packed codes                                   |
| `smoothing`          | (I,)              | factor of each input channel: all ones                   |
| `input_scale`        | (1,)              | frozen step of the input                                 |
| `input_global_scale` | (1,)              | upper level of two of the input                          |
| `bias`               | (O,)              | in the model's dtype                                     |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mqat.verify.reference_quant import expand, fp4_values
from mqat.verify.tensor_specs import TensorSpec


@dataclass(frozen=True)
class Storage:
    """How the weight of a module is stored, and how its input is quantized.

    Attributes:
        names: Tensor of the table above -> suffix of its name in the files.
        bits: Of a code; 0: unquantized.
        is_float: FP8 or FP4 codes.
        granularity: Elements that share a weight scale: `tensor`, `channel` or `group:<size>`.
        input: A kind of `reference_quant.quantize_input`; None: unquantized.
        packing: `words`: codes in 32-bit words along columns; `rows`: row pairs in bytes; `columns`:
            column pairs in bytes; empty: one element per code.
        bytes_dtype: Of row pairs.
        scale_dtypes: Allowed for scales of groups.
        scalar: Stored shape of what one number describes.
        is_column: Scales of channels are stored as (O, 1).
        is_reciprocal: Global scales are stored as their reciprocals.
        is_reloaded: The file holds the weight on its grid, and the loader quantizes it again.
        label: What the format calls it.
    """

    names: dict[str, str]
    bits: int = 0
    is_float: bool = False
    granularity: str = "channel"
    input: str | None = None
    packing: str = ""
    bytes_dtype: str = "U8"
    scale_dtypes: tuple[str, ...] = ("F32",)
    scalar: tuple[int, ...] = (1,)
    is_column: bool = False
    is_reciprocal: bool = False
    is_reloaded: bool = False
    label: str = ""

    @property
    def is_asymmetric(self) -> bool:
        """Weights have zero points."""
        return "zero_point" in self.names

    @property
    def has_two_levels(self) -> bool:
        """E4M3 block scales stand under a global scale."""
        return "global_scale" in self.names

    @property
    def group_size(self) -> int | None:
        """Elements of a group; None: scales of channels, or of the whole tensor."""
        kind, _, size = self.granularity.partition(":")
        return int(size) if kind == "group" else None

    @property
    def weight_name(self) -> str:
        """Suffix of the codes, or of the unquantized weight."""
        return self.names.get("codes") or self.names["weight"]

    def __str__(self) -> str:
        """As in messages and tables."""
        if self.label or not self.bits:
            return self.label or "unquantized"
        kind = f"{'fp' if self.is_float else 'int'}{self.bits}"
        text = f"{kind} per {self.granularity}" + ", zero points" * self.is_asymmetric
        text += ", packed" * bool(self.packing)
        return text if self.input is None else f"{text}, inputs {self.input}"

    def specs(
        self, shape: tuple[int, int], dtype: str, is_row_parallel: bool
    ) -> dict[str, TensorSpec]:
        """What a rank must hold of each tensor of the table, if it is stored at all.

        Args:
            shape: (out, in) of the rank's part of the weight.
            dtype: Of unquantized tensors.
            is_row_parallel: Ranks hold columns, and so the same scales of channels.
        """
        out, width = shape
        groups = -(-width // (self.group_size or width))
        codes = TensorSpec(shape, ("F8_E4M3" if self.is_float else "I8",))
        if self.packing == "words":
            codes = TensorSpec((out, -(-width * self.bits // 32)), ("I32",))
        elif self.packing == "rows":
            codes = TensorSpec((out // 2, width), (self.bytes_dtype,))
        elif self.packing == "columns":
            codes = TensorSpec((out, width // 2), ("U8",))
        if self.granularity == "tensor":
            scale = TensorSpec(self.scalar, ("F32",), True)
        elif self.granularity == "channel":
            scale = TensorSpec((out, 1) if self.is_column else (out,), ("F32",), is_row_parallel)
        else:
            dtypes = ("F8_E4M3",) if self.has_two_levels else self.scale_dtypes
            scale = TensorSpec((out, groups), dtypes)
        one = TensorSpec(self.scalar, ("F32",), True)
        return {
            "weight": TensorSpec(shape, (dtype,)),
            "codes": codes,
            "scale": scale,
            "zero_point": TensorSpec((-(-out * self.bits // 32), groups), ("I32",)),
            "global_scale": one,
            "range_scale": one,
            "shape": TensorSpec((2,), ("I64",), True),
            "smoothing": TensorSpec((width,), (dtype,), not is_row_parallel),
            "input_scale": one,
            "input_global_scale": one,
            "bias": TensorSpec((out,), (dtype,), is_row_parallel),
        }


def int4_codes(packed: Tensor) -> Tensor:
    """Codes int8 [O, I] from bytes [O/2, I]: even row in the low nibble, two's complement."""
    unsigned = packed.contiguous().view(torch.uint8)
    rows = torch.stack([unsigned % 16, unsigned // 16], dim=1).flatten(0, 1).to(torch.int8)
    return torch.where(rows >= 8, rows - 16, rows)


def _fp4_codes(packed: Tensor) -> Tensor:
    """Codes uint8 [O, I] from bytes [O, I/2]: the even column in the low nibble."""
    return torch.stack([packed % 16, packed // 16], dim=2).flatten(1)


def _from_words(words: Tensor, bits: int) -> Tensor:
    """Signed numbers in 32-bit words, int8 [rows, words * fields]; offset binary, the lowest first."""
    half = 1 << (bits - 1)
    wide = words.to(torch.int64) & 0xFFFFFFFF
    fields = [(wide >> (bits * i)) % (2 * half) - half for i in range(32 // bits)]
    return torch.stack(fields, dim=-1).to(torch.int8).flatten(1)


def reload_w8a16(weight: Tensor) -> Tensor:
    """What the loader makes of an unquantized W8A16 weight: amax/128 of each output channel."""
    values = weight.float()
    scale = values.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 128
    return (values / scale).round().clamp(-128, 127) * scale


@dataclass(frozen=True)
class StoredLinear:
    """One rank's part of a linear, as read from the files.

    Attributes:
        storage: How it is stored.
        shape: (out, in) of the part.
        tensors: By the names of the module's table.
    """

    storage: Storage
    shape: tuple[int, int]
    tensors: Mapping[str, Tensor]

    def codes(self) -> Tensor:
        """[O, I]: int8 (unsigned ones moved to be signed), float8, or uint8 of FP4."""
        stored = self.tensors["codes"]
        if self.storage.packing == "words":
            return _from_words(stored, self.storage.bits)[:, : self.shape[1]]
        if self.storage.packing == "rows":
            return int4_codes(stored)
        return _fp4_codes(stored) if self.storage.packing == "columns" else stored

    def code_values(self) -> Tensor:
        """Multiples of the step, float32 [O, I]."""
        codes = self.codes()
        return fp4_values(codes) if codes.dtype == torch.uint8 else codes.float()

    def scale(self) -> Tensor:
        """As stored, float32, in the shape of its granularity: (1,), [O] or [O, G]."""
        scale = self.tensors["scale"].float()
        return scale if self.storage.group_size else scale.reshape(-1)

    def zero_point(self) -> Tensor:
        """int8 [O, G], packed along the rows and moved like the codes."""
        zeros = _from_words(self.tensors["zero_point"].t(), self.storage.bits)
        return zeros[:, : self.shape[0]].t()

    def step(self) -> Tensor:
        """`scale` times the global one, if there is one."""
        if not self.storage.has_two_levels:
            return self.scale()
        above = self.tensors["global_scale"]
        return self.scale() / above if self.storage.is_reciprocal else self.scale() * above

    def weight(self) -> Tensor:
        """What a server multiplies by, float32 [O, I]."""
        storage = self.storage
        if "weight" in self.tensors:
            weight = self.tensors["weight"]
            return reload_w8a16(weight) if storage.is_reloaded else weight.float()
        values, width = self.code_values(), self.shape[1]
        if storage.is_asymmetric:
            values = values - expand(self.zero_point().float(), storage.granularity, width)
        return values * expand(self.step(), storage.granularity, width)

    def input_step(self) -> Tensor | None:
        """What is frozen of the input, (1,)."""
        if "input_global_scale" in self.tensors:
            above = self.tensors["input_global_scale"]
            return 1 / above if self.storage.is_reciprocal else above
        return self.tensors.get("input_scale")

    def bits_per_weight(self) -> float:
        """Stored bits, scales included and biases not."""
        kept = [t for name, t in self.tensors.items() if name not in ("shape", "bias")]
        return 8 * sum(t.numel() * t.element_size() for t in kept) / (self.shape[0] * self.shape[1])

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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mqat.verify.facts import Part
from mqat.verify.reference_quant import expand, fp4_values


@dataclass(frozen=True)
class Storage:
    """How the weight of a module is stored, and how its input is quantized."""

    names: dict[str, str]  # tensor of the table above -> suffix of its name in the files
    bits: int = 0  # of a code; 0: unquantized
    is_float: bool = False  # FP8 or FP4 codes
    granularity: str = "channel"  # who share a scale, or `tensor`, `group:<size>`
    input: str | None = None  # a kind of `reference_quant.quantize_input`; None: unquantized
    packing: str = ""  # `words`: 32 bits along columns; `rows`, `columns`: pairs of them in bytes
    bytes_dtype: str = "U8"  # of row pairs
    scale_dtypes: tuple[str, ...] = ("F32",)  # allowed for scales of groups
    scalar: tuple[int, ...] = (1,)  # stored shape of what one number describes
    is_column: bool = False  # scales of channels are stored as (O, 1)
    is_reciprocal: bool = False  # global scales are stored as their reciprocals
    is_reloaded: bool = False  # the weight is stored on its grid, and the loader quantizes it again
    label: str = ""  # what the format calls it

    @property
    def group_size(self) -> int:
        """Elements of a group; 0: scales of channels, or of the whole tensor."""
        return int(self.granularity.partition(":")[2] or 0)

    def __str__(self) -> str:
        if self.label or not self.bits:
            return self.label or "unquantized"
        kind = f"{'fp' if self.is_float else 'int'}{self.bits}"
        text = f"{kind} per {self.granularity}" + ", zero points" * ("zero_point" in self.names)
        text += ", packed" * bool(self.packing)
        return text if self.input is None else f"{text}, inputs {self.input}"


UNQUANTIZED = Storage({"weight": "weight"})


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor's header must say."""

    shape: tuple[int, ...]  # on one rank
    dtypes: tuple[str, ...]  # allowed ones, as safetensors names them
    is_replicated: bool = False  # every tensor-parallel rank holds the same bytes

    def __str__(self) -> str:
        return f"{' or '.join(self.dtypes)} {self.shape}"


@dataclass(frozen=True)
class Module:
    """A linear of a directory, cut over tensor-parallel ranks."""

    name: str  # full, as in the files of a stage
    parts: tuple[Part, ...]  # in row order
    storage: Storage
    suffixes: Mapping[str, str]  # of the storage's tensors and the bias
    dtype: str  # of unquantized tensors, as safetensors names it
    rows: tuple[int, ...]  # of each part on one rank
    shape: tuple[int, int]  # (out, in) on one rank
    is_row_parallel: bool  # ranks hold columns; otherwise rows
    copies: int  # consecutive ranks that hold the same key/value head
    is_transposed: bool = False  # an unquantized weight is stored as (in, out)
    num_experts: int = 0  # whose tensors are stored as one, [experts, ...]; 0: it has its own
    expert: int = 0  # its slice

    def full(self, tensor: str) -> str:
        """Name in the files of a tensor of the table above."""
        return f"{without_slice(self.name)}.{self.suffixes[tensor]}"

    def is_stacked(self, tensor: str) -> bool:
        """Whether it is a slice of a stored one; otherwise all experts have the same."""
        return self.num_experts > 0 and tensor in ("weight", "codes", "scale")

    @property
    def shares_input_scale(self) -> bool:
        """Whether the experts of its layer have one step of inputs: the largest that was trained."""
        return self.num_experts > 0 and "input_scale" in self.suffixes

    def specs(self) -> dict[str, TensorSpec]:
        """Tensor of the table above -> what a rank must hold."""
        storage, (out, width), model = self.storage, self.shape, (self.dtype,)
        groups = -(-width // (storage.group_size or width))
        codes = {
            "": (self.shape, "F8_E4M3" if storage.is_float else "I8"),
            "words": ((out, -(-width * storage.bits // 32)), "I32"),
            "rows": ((out // 2, width), storage.bytes_dtype),
            "columns": ((out, width // 2), "U8"),
        }[storage.packing]
        one = scale = TensorSpec(storage.scalar, ("F32",), True)
        if storage.granularity == "channel":
            shape = (out, 1) if storage.is_column else (out,)
            scale = TensorSpec(shape, ("F32",), self.is_row_parallel)
        elif storage.group_size:
            lower = ("F8_E4M3",) if "global_scale" in storage.names else storage.scale_dtypes
            scale = TensorSpec((out, groups), lower)
        specs = {
            "weight": TensorSpec(self.shape[::-1] if self.is_transposed else self.shape, model),
            "codes": TensorSpec(codes[0], (codes[1],)),
            "scale": scale,
            "zero_point": TensorSpec((-(-out * storage.bits // 32), groups), ("I32",)),
            "shape": TensorSpec((2,), ("I64",), True),
            "smoothing": TensorSpec((width,), model, not self.is_row_parallel),
            "bias": TensorSpec((out,), model, self.is_row_parallel),
        }
        found = {tensor: specs.get(tensor, one) for tensor in self.suffixes}
        return {tensor: self._stored(tensor, spec) for tensor, spec in found.items()}

    def _stored(self, tensor: str, spec: TensorSpec) -> TensorSpec:
        experts = (self.num_experts,) if self.is_stacked(tensor) else ()
        return replace(spec, shape=(*experts, *spec.shape))

    def by_part(self, tensor: Tensor, dim: int = 0) -> dict[str, Tensor]:
        """Output features of one rank, by role."""
        pieces = zip(self.parts, tensor.split(self.rows, dim), strict=True)
        return {part.role: piece for part, piece in pieces}

    def join(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """All ranks' tensors as whole ones by role, each key/value head once."""
        if self.is_row_parallel:
            whole = torch.cat(list(tensors), dim=1) if tensors[0].dim() == 2 else tensors[0]
            return {self.parts[0].role: whole}
        split = [self.by_part(tensor) for tensor in tensors]
        strides = {p.role: self.copies if p.rows == "key_value" else 1 for p in self.parts}
        return {role: torch.cat([s[role] for s in split[::n]]) for role, n in strides.items()}


def without_slice(name: str) -> str:
    """Name in the files of a module; `mlp.fc[3]` is the slice of `mlp.fc` for an expert."""
    return name.partition("[")[0]


def int4_codes(packed: Tensor) -> Tensor:
    """Codes int8 [O, I] from bytes [O/2, I]: even row in the low nibble, two's complement."""
    unsigned = packed.contiguous().view(torch.uint8)
    rows = torch.stack([unsigned % 16, unsigned // 16], dim=1).flatten(0, 1).to(torch.int8)
    return torch.where(rows >= 8, rows - 16, rows)


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
    """One rank's part of a module, as read from the files."""

    module: Module
    tensors: Mapping[str, Tensor]  # by the names of the table above

    def codes(self) -> Tensor:
        """[O, I]: int8 (unsigned ones moved to be signed), float8, or uint8 of FP4."""
        stored, storage = self.tensors["codes"], self.module.storage
        if storage.packing == "words":
            return _from_words(stored, storage.bits)[:, : self.module.shape[1]]
        if storage.packing == "columns":  # the even one in the low nibble
            return torch.stack([stored % 16, stored // 16], dim=2).flatten(1)
        return int4_codes(stored) if storage.packing == "rows" else stored

    def code_values(self) -> Tensor:
        """Multiples of the step, float32 [O, I]."""
        return fp4_values(codes) if (codes := self.codes()).dtype == torch.uint8 else codes.float()

    def scale(self) -> Tensor:
        """As stored, float32, in the shape of its granularity: (1,), [O] or [O, G]."""
        scale = self.tensors["scale"].float()
        return scale if self.module.storage.group_size else scale.reshape(-1)

    def zero_point(self) -> Tensor:
        """int8 [O, G], packed along the rows and moved like the codes."""
        zeros = _from_words(self.tensors["zero_point"].t(), self.module.storage.bits)
        return zeros[:, : self.module.shape[0]].t()

    def step(self) -> Tensor:
        """Of both levels, shaped like `scale`."""
        above = self.tensors.get("global_scale", torch.ones(1))
        return self.scale() / above if self.module.storage.is_reciprocal else self.scale() * above

    def weight(self) -> Tensor:
        """What a server multiplies by, float32 [O, I]."""
        storage, width, weight = (
            self.module.storage,
            self.module.shape[1],
            self.tensors.get("weight"),
        )
        if weight is not None:
            return reload_w8a16(weight) if storage.is_reloaded else weight.float()
        values = self.code_values()
        if "zero_point" in self.tensors:
            values = values - expand(self.zero_point().float(), storage.granularity, width)
        return values * expand(self.step(), storage.granularity, width)

    def input_step(self) -> Tensor | None:
        """What is frozen of the input, (1,)."""
        above = self.tensors.get("input_global_scale")
        if above is None:
            return self.tensors.get("input_scale")
        return 1 / above if self.module.storage.is_reciprocal else above

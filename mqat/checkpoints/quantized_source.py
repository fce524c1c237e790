"""Hugging Face directories whose weights are quantized already: told apart by name, some dequantized.

| method             | dequantized                          | weight                                    |
|--------------------|--------------------------------------|-------------------------------------------|
| compressed-tensors | int-, float-, naive-, pack-quantized | (codes - zero_point) * weight_scale       |
| FP8                | blocks, or whole tensors             | codes * weight_scale_inv                  |
| ModelOpt           | FP8, FP8_PER_CHANNEL_PER_TOKEN       | codes * weight_scale                      |

The product is that of float32. Everything else is refused with its method's name: its codes are laid out
for kernels, or lie on grids with scales of their own.

Sources: compressed-tensors 0.20 `compressors/{naive_quantized,pack_quantized}`; transformers
`integrations/finegrained_fp8.py`; nvidia-modelopt `torch/export/quant_utils.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mqat.data.strict_json import parse_json
from mqat.errors import UserError

_DEQUANTIZE = (
    "have transformers do it (from_pretrained(DIR).dequantize(), then save_pretrained) and import that, "
    "or import the unquantized model"
)
_ORIGINAL = "import the unquantized model"
# quant_method -> what it is called, and the way out.
_METHODS = {
    "awq": ("AWQ", _ORIGINAL), "gptq": ("GPTQ", _ORIGINAL), "marlin": ("Marlin", _ORIGINAL),
    "bitsandbytes": ("bitsandbytes", _DEQUANTIZE), "mxfp4": ("MXFP4", _DEQUANTIZE),
    "fbgemm_fp8": ("FBGEMM FP8", _ORIGINAL), "quark": ("AMD Quark", _ORIGINAL),
    "hqq": ("HQQ", _ORIGINAL), "quanto": ("Quanto", _ORIGINAL), "eetq": ("EETQ", _ORIGINAL),
    "aqlm": ("AQLM", _ORIGINAL), "vptq": ("VPTQ", _ORIGINAL), "spqr": ("SpQR", _ORIGINAL),
    "higgs": ("HIGGS", _ORIGINAL), "bitnet": ("BitNet", _ORIGINAL), "torchao": ("torchao", _ORIGINAL),
    "auto-round": ("AutoRound", _ORIGINAL), "modelopt": ("ModelOpt", _ORIGINAL),
    "compressed-tensors": ("compressed-tensors", _ORIGINAL), "fp8": ("FP8", _ORIGINAL),
}  # fmt: skip
# Beside a config.json that says nothing -> method.
_FILES = {
    "hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq",
}  # fmt: skip
_FORMATS = ("int-quantized", "float-quantized", "naive-quantized", "pack-quantized")
_MODELOPT = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN")
_ACTIVATIONS = ("input_scale", "input_zero_point", "output_scale", "k_scale", "v_scale", "q_scale")
_SCALES = ("weight_scale", "weight_scale_inv")
_FP8, _INT8, _WORDS = "F8_E4M3", "I8", "I32"
View = Callable[[str], Any]  # a tensor of the files, to be sliced


@dataclass(frozen=True)
class _Weight:
    """A quantized weight: its parts by their last name, and its own shape."""

    parts: Mapping[str, str]
    shape: tuple[int, int]


@dataclass
class QuantizedSource:
    """Reads weights out of the codes of a directory.

    Attributes:
        path: For messages.
        method: What quantized it.
        block: Rows and columns that share a scale, where not all or one do.
    """

    path: Path
    method: str
    block: tuple[int, int] | None = None
    _weights: dict[str, _Weight] = field(default_factory=dict)

    def take(
        self, shapes: dict[str, tuple[int, ...]], dtypes: dict[str, str], view: View
    ) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
        """Shapes and dtypes of the weights in the place of their codes and scales.

        Raises:
            UserError: There are no codes, or codes without scales.
        """
        shapes, dtypes = dict(shapes), dict(dtypes)
        dropped = [name for name in shapes if name.rpartition(".")[2] in _ACTIVATIONS]
        codes = [
            name for name, dtype in dtypes.items()
            if (name.endswith(".weight") and dtype in (_FP8, _INT8)) or name.endswith(".weight_packed")
        ]  # fmt: skip
        if not codes:
            raise UserError(
                f"{self.path}: config.json says that its weights are quantized by {self.method}, but no "
                "tensor holds codes; remove quantization_config if the weights are plain."
            )
        for name in codes:
            module = name.rpartition(".")[0]
            parts = {n.rpartition(".")[2]: n for n in shapes if n.rpartition(".")[0] == module}
            parts = {k: n for k, n in parts.items() if k.startswith("weight")}
            if not parts.keys() & set(_SCALES):
                raise UserError(f"{self.path}: {name!r} has codes and no scale beside it.")
            shape = shapes[name]
            if "weight_packed" in parts:
                shape = tuple(
                    int(n) for n in view(parts.get("weight_shape", name))[:].flatten()[:2]
                )
            if len(shape) != 2:
                raise UserError(
                    f"{self.path}: {name!r} holds codes of shape {shape}; only matrices are "
                    f"dequantized, not experts in one tensor. {_ORIGINAL}."
                )
            weight = _Weight(parts, (shape[0], shape[1]))
            self._check(module, weight, shapes)
            self._weights[f"{module}.weight"] = weight
            for part in parts.values():
                del shapes[part], dtypes[part]
            shapes[f"{module}.weight"], dtypes[f"{module}.weight"] = weight.shape, "F32"
        for name in dropped:
            del shapes[name], dtypes[name]
        scales = f", and {len(dropped)} scales of activations are left out" if dropped else ""
        warnings.warn(
            f"{self.path}: {len(codes)} weights quantized by {self.method} are dequantized and keep its "
            f"rounding{scales}.",
            stacklevel=4,
        )
        return shapes, dtypes

    def _check(self, module: str, weight: _Weight, shapes: Mapping[str, tuple[int, ...]]) -> None:
        known = {
            "weight",
            "weight_packed",
            "weight_shape",
            "weight_zero_point",
            "weight_g_idx",
            *_SCALES,
        }
        unknown = sorted(weight.parts.keys() - known)
        if unknown:
            raise UserError(
                f"{self.path}: {module}.{unknown[0]} belongs to a grid of {self.method} that is not "
                f"dequantized; {_ORIGINAL}."
            )
        if "weight_packed" in weight.parts:
            words = shapes[weight.parts["weight_packed"]]
            if (
                len(words) != 2
                or words[0] != weight.shape[0]
                or not _bits(words[1], weight.shape[1])
            ):
                raise UserError(
                    f"{self.path}: {module}.weight_packed of shape {words} holds no 4- or 8-bit codes "
                    f"of a weight of shape {weight.shape}; {_ORIGINAL}."
                )

    def has(self, name: str) -> bool:
        """Whether a tensor is dequantized."""
        return name in self._weights

    def read(self, name: str, rows: slice, cols: slice, view: View) -> Tensor:
        """Rows and columns of a dequantized weight, float32."""
        weight = self._weights[name]
        parts, shape = weight.parts, weight.shape
        rows, cols = (_positive(part, size) for part, size in zip((rows, cols), shape, strict=True))
        scale_name = next(parts[key] for key in _SCALES if key in parts)
        scale = _grid(_all(view(scale_name)))
        row_of = self._index(scale_name, scale.shape[0], shape, 0)[rows]
        column_of = self._index(scale_name, scale.shape[1], shape, 1)[cols]
        if "weight_g_idx" in parts:
            column_of = view(parts["weight_g_idx"])[cols].long()
        bits = 8
        if "weight_packed" in parts:
            packed = view(parts["weight_packed"])
            bits = _bits(packed.get_shape()[1], shape[1])
            codes = _unpacked(packed, rows, cols, bits)
        else:
            codes = view(parts["weight"])[rows, cols].float()
        if "weight_zero_point" in parts:
            zero = _zero_points(_all(view(parts["weight_zero_point"])), scale.shape, shape[0], bits)
            codes = codes - zero[row_of][:, column_of]
        return codes * scale[row_of][:, column_of].float()

    def _index(self, name: str, count: int, shape: tuple[int, int], dim: int) -> Tensor:
        """Entry of the scales for each row, or column, of the weight."""
        size = shape[dim]
        steps = {1: size, size: 1}
        if count not in steps:
            steps[count] = self.block[dim] if self.block is not None else 0
            if not steps[count] and size % count == 0:
                steps[count] = size // count
            if not steps[count] or -(-size // steps[count]) != count:
                raise UserError(
                    f"{self.path}: {name!r} has {count} scales for {size} "
                    f"{('rows', 'columns')[dim]}, which fits no block size of config.json."
                )
        return torch.arange(size) // steps[count]


def quantized_source(path: Path, config: Any) -> QuantizedSource | None:
    """How the weights of a directory are quantized; None: they are not.

    Args:
        path: The directory.
        config: Its `config.json`.

    Raises:
        UserError: They are, in a way that is not dequantized; names the method and the way out.
    """
    said = config.get("quantization_config") if isinstance(config, Mapping) else None
    method = said.get("quant_method") if isinstance(said, Mapping) else None
    if said is None:
        found = next((name for name in _FILES if (path / name).is_file()), None)
        if found is None:
            return None
        method, said = _FILES[found], _json(path / found)
    if not isinstance(said, Mapping):
        raise UserError(
            f"{path}: quantization_config={said!r} is no description of quantized weights."
        )
    if method is None and ("load_in_4bit" in said or "load_in_8bit" in said):
        method = "bitsandbytes"
    said = said | said["quantization"] if isinstance(said.get("quantization"), Mapping) else said
    if method == "compressed-tensors" and (block := _compressed(said)) is not None:
        form = str(said.get("format"))
        return QuantizedSource(path, f"compressed-tensors ({form})", block or None)
    if method == "fp8" and said.get("fmt", "e4m3") == "e4m3":
        size = said.get("weight_block_size")
        return QuantizedSource(path, "FP8", tuple(size) if isinstance(size, list) else None)
    if method == "modelopt" and said.get("quant_algo") in _MODELOPT:
        return QuantizedSource(path, f"ModelOpt ({said['quant_algo']})")
    name, way_out = _METHODS.get(str(method), (str(method), _ORIGINAL))
    kind = next((said[key] for key in ("quant_algo", "format", "bits") if said.get(key)), None)
    kind = f" ({kind}{' bits' if isinstance(kind, int) else ''})" if kind is not None else ""
    raise UserError(
        f"{path}: its weights are quantized by {name}{kind}, which is not read; {way_out}."
    )


def _compressed(said: Mapping[str, Any]) -> tuple[int, int] | tuple[()] | None:
    """Block of a compressed-tensors configuration; (): it has none; None: a form that is not read."""
    groups = said.get("config_groups")
    if not isinstance(groups, Mapping):
        return None
    blocks = set()
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping) or weights.get("num_bits") not in (4, 8):
            return None
        if (group.get("format") or said.get("format")) not in _FORMATS:
            return None
        block, size = weights.get("block_structure"), weights.get("group_size")
        if isinstance(block, list) and len(block) == 2:
            blocks.add((int(block[0]), int(block[1])))
        elif isinstance(size, int) and size > 0:
            blocks.add((1, size))
    return next(iter(blocks), ()) if len(blocks) <= 1 else None


def _json(file: Path) -> Any:
    try:
        return parse_json(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: not readable as JSON ({error}).") from error


def _positive(part: slice, size: int) -> slice:
    span = range(size)[part]
    return slice(span.start, span.stop)


def _grid(scale: Tensor) -> Tensor:
    """Scales as rows and columns; a list of them is one a row."""
    return scale.reshape(-1, 1) if scale.dim() < 2 else scale


def _all(view: Any) -> Tensor:
    found: Tensor = view[:] if view.get_shape() else view[...]
    return found


def _bits(words: int, columns: int) -> int:
    """Of each code, where `words` of 32 bits hold a row; 0: of no size that is read."""
    return next((bits for bits in (4, 8) if -(-columns * bits // 32) == words), 0)


def _split(words: Tensor, bits: int) -> Tensor:
    """Signed codes of int32 words: [..., n] -> [..., n * 32 / bits], the lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    codes = (words[..., None] >> shifts) & ((1 << bits) - 1)
    return (codes - (1 << (bits - 1))).flatten(-2).float()


def _unpacked(packed: Any, rows: slice, cols: slice, bits: int) -> Tensor:
    per_word = 32 // bits
    first = cols.start // per_word
    codes = _split(packed[rows, first : -(-cols.stop // per_word)], bits)
    return codes[:, cols.start - first * per_word : cols.stop - first * per_word]


def _zero_points(stored: Tensor, grid: tuple[int, ...], rows: int, bits: int) -> Tensor:
    """On the grid of the scales; packed ones lie along the rows."""
    if stored.dtype != torch.int32 or tuple(stored.shape) == tuple(grid):
        return _grid(stored).float()
    return _split(stored.T.contiguous(), bits).T[: grid[0] if grid[0] > 1 else rows]

"""A checkpoint of mqat's own: any slice of its tensors (`torch_dist.py`), and what they are."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from mqat.checkpoints.folder import Folder
from mqat.checkpoints.manifest import DESCRIPTION, Checksums, check_files, read_description
from mqat.checkpoints.torch_dist import TorchDist
from mqat.errors import UserError
from mqat.kernels.frozen_codes import frozen_shapes
from mqat.models.adapters import Adapters
from mqat.models.decoder import DecoderConfig
from mqat.models.schemes import (
    Scheme,
    kv_cache_schemes,
    linear_schemes,
    scheme_from_dict,
    table_schemes,
)
from mqat.models.structure import (
    TABLES,
    is_table_key,
    packed_key,
    quantizer_key,
    split_name,
)
from mqat.parallel.layout import packed_units
from mqat.quant.scheme import LinearScheme

# Before the names of what is not the model's: the optimizer's state.
_TRAINING = "optimizer."


class CheckpointReader(TorchDist):
    """Read-only view of a checkpoint; its files are mapped, not loaded.

    Attributes:
        description: Parsed `mqat.json`.
        model: Global sizes.
        layers: Global linear name -> scheme, quantized linears only.
        tables: Name of a quantized vocabulary table -> scheme.
        kv_cache: Global name of a core attention -> scheme of its cache.
        is_packed: Quantized weights are there packed, and not in floats.
        adapters: Low-rank ones beside the weights; None: there are none.

    Args:
        path: Checkpoint directory.
        crc: Files whose checksums are compared too, as for `check_files`.

    Raises:
        ValueError: Incomplete, damaged, or not a checkpoint; names the file.
    """

    def __init__(self, path: Path, *, crc: Checksums = "all") -> None:
        self.path = path
        self.description = read_description(path)
        try:
            check_files(path, self.description, crc=crc)
            self.model = DecoderConfig.from_dict(self.description["model"])
            quantization = self.description["quantization"] or {"layers": {}}
            schemes = {
                name: scheme_from_dict(scheme) for name, scheme in quantization["layers"].items()
            }
            saved = self.description.get("adapters")
            self.is_packed = bool(self.description.get("is_packed", False))
            self.adapters = None if saved is None else Adapters.from_dict(saved)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path / DESCRIPTION}: damaged ({error!r}); use another checkpoint."
            ) from error
        self.layers, self.kv_cache = linear_schemes(schemes), kv_cache_schemes(schemes)
        self.tables = table_schemes(schemes)
        super().__init__(Folder(path))
        expected = self.model.checkpoint_shapes()
        if self.is_packed:
            expected = _without_packed(expected, self.model, self.layers)
            expected |= _packed_shapes(self.model, self.layers)
        expected |= _scale_shapes(self.model, schemes, is_packed=self.is_packed)
        if self.adapters is not None:
            expected |= self.adapters.shapes(self.model)
        self._check_shapes(expected)
        self._check_strays(expected)

    def _check_shapes(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        for key, shape in expected.items():
            found = self.shape(key)
            is_table = is_table_key(key)
            padded = is_table and found[1:] == shape[1:] and found[0] >= shape[0]
            if found != shape and not padded:
                raise UserError(
                    f"{self.path}: tensor {key!r} has shape {found}, but the model described in "
                    f"{DESCRIPTION} needs {shape}; use another checkpoint."
                )

    def _check_strays(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Refuses tensors that a model built from the description would be without."""
        named = {key for key in self._tensors if not key.startswith(_TRAINING)}
        strays = sorted(named - expected.keys())
        if strays:
            more = f" and {len(strays) - 3} more" if len(strays) > 3 else ""
            raise UserError(
                f"{self.path}: {', '.join(strays[:3])}{more} have no place in the model described in "
                f"{DESCRIPTION}, which would compute something else without them. Save it again with "
                "the description that mqat.describe_model gives."
            )

    def frozen(self, module: str, operand: str, tensor: str) -> Tensor:
        """Frozen quantizer state, whole; arguments as for `models.structure.quantizer_key`."""
        return self.read(quantizer_key(module, operand, tensor))


def _without_packed(
    shapes: Mapping[str, tuple[int, ...]], model: DecoderConfig, layers: Mapping[str, LinearScheme]
) -> dict[str, tuple[int, ...]]:
    """Without the keys of quantized linears, which are packed in every layer or in none."""
    packed = set()
    for name in layers:
        layer, short = split_name(name)
        packed.add(model.place(model.linear(short).key, layer)[0])
    return {key: shape for key, shape in shapes.items() if key not in packed}


def _packed_shapes(
    model: DecoderConfig, layers: Mapping[str, LinearScheme]
) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for name, scheme in layers.items():
        assert scheme.weight is not None, "only quantized weights are packed"
        count, unit, _ = packed_units(model, model.linear(split_name(name)[1]), scheme.weight)
        for part, shape in frozen_shapes(scheme.weight, unit).items():
            shapes[packed_key(name, part)] = (count, *shape)
    return shapes


def _scale_shapes(
    model: DecoderConfig, schemes: Mapping[str, Scheme], *, is_packed: bool
) -> dict[str, tuple[int, ...]]:
    """Shape of everything that the quantizers of a quantized checkpoint have frozen."""
    shapes = {}
    for name, scheme in schemes.items():
        for kind, operand in scheme.operands.items():
            if is_packed and kind == "weight":
                continue
            weight = None
            if kind == "weight":
                table = (model.vocab_size, model.hidden_size)
                is_table = name in (table.name for table in TABLES)
                weight = table if is_table else model.linear_shape(split_name(name)[1])
            for part, shape in operand.frozen_shapes(weight).items():
                shapes[quantizer_key(name, kind, part)] = shape
    return shapes

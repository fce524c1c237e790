"""The exporter of `.nemo`: trained weights in one archive, for NeMo 1 to train on.

It holds weights as they are trained, not as they are served: NeMo quantizes with quantizers of its own.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from mqat.checkpoints.reader import CheckpointReader
from mqat.export.exporter import PRODUCER, DirectoryContents, ExportOptions
from mqat.export.nemo.model_config import check_model, model_config
from mqat.export.nemo.torch_dist import FORMAT, Record, empty_common, index, write_records
from mqat.export.stream import TensorPlan
from mqat.models.decoder import DecoderConfig
from mqat.models.schemes import Scheme
from mqat.models.structure import is_in_layer, is_table_key

_FOLDER, _PREFIX = "model_weights", "model."
_SENTENCEPIECE, _JSON = "tokenizer.model", "tokenizer.json"


class NemoExporter:
    """NeMo 1's archive with a `torch_dist` checkpoint, `model_config.yaml` and the tokenizer's files."""

    format = "nemo"
    style = None
    output_name = "model.nemo"
    is_served = False

    def check(
        self, model: DecoderConfig, schemes: Mapping[str, Scheme], options: ExportOptions
    ) -> None:
        """As `Exporter.check`."""
        options.refuse_parts(self.format, "loads at any layout, and serves nothing")
        check_model(model)

    def warning(self, schemes: Mapping[str, Scheme]) -> str | None:
        """As `Exporter.warning`."""
        if not schemes:
            return None
        return (
            "a .nemo holds the trained weights before they are rounded, and no scales: NeMo trains them "
            "on unquantized, until it quantizes them itself. To serve them, export trtllm or hf."
        )

    def contents(
        self, reader: CheckpointReader, tokenizer: Path, options: ExportOptions
    ) -> DirectoryContents:
        """As `Exporter.contents`."""
        model, dtype = reader.model, options.torch_dtype
        files = {"__0_0.distcp": list(_top_records(reader, dtype))}
        for layer in range(model.num_layers):
            files[f"__{layer + 1}_0.distcp"] = list(_layer_records(reader, layer, dtype))
        config = model_config(model, options.dtype, _tokenizer(tokenizer))
        texts: dict[str, Any] = {
            "model_config.yaml": yaml.safe_dump(config, sort_keys=False),
            f"{_FOLDER}/.metadata": index(files),
            f"{_FOLDER}/metadata.json": FORMAT,
            f"{_FOLDER}/common.pt": empty_common(),
            "config.json": model.to_hf(options.dtype) | {"producer": PRODUCER},
        }
        weights: dict[str, Callable[[], list[TensorPlan]]] = {
            f"{_FOLDER}/{name}": partial(list, [record.plan for record in records])
            for name, records in files.items()
        }
        return DirectoryContents(weights, texts, as_tar=True, write=write_records)


def _tokenizer(directory: Path) -> dict[str, Any]:
    """What `model_config.yaml` says of it."""
    if (directory / _SENTENCEPIECE).is_file() and not (directory / _JSON).is_file():
        return {
            "library": "sentencepiece", "type": None, "model": f"nemo:{_SENTENCEPIECE}",
            "vocab_file": None, "merge_file": None, "sentencepiece_legacy": False,
        }  # fmt: skip
    # NeMo takes these from a directory or a hub: whoever restores the archive names it.
    return {"library": "huggingface", "type": ".", "model": None, "use_fast": True}


def _top_records(reader: CheckpointReader, dtype: torch.dtype) -> Iterator[Record]:
    for key, shape in reader.model.checkpoint_shapes().items():
        if is_in_layer(key):
            continue
        region = (slice(0, shape[0]),) if is_table_key(key) else ()  # without padding
        plan = _plan(reader, key, region, shape, dtype)
        yield Record(plan, shape, (0,) * len(shape))


def _layer_records(reader: CheckpointReader, layer: int, dtype: torch.dtype) -> Iterator[Record]:
    for key, shape in reader.model.checkpoint_shapes().items():
        if is_in_layer(key):
            region = (slice(layer, layer + 1),)
            plan = _plan(reader, key, region, (1, *shape[1:]), dtype)
            yield Record(plan, shape, (layer, *(0,) * (len(shape) - 1)))


def _plan(
    reader: CheckpointReader,
    key: str,
    region: tuple[slice, ...],
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> TensorPlan:
    def chunks() -> Iterator[Tensor]:
        yield reader.view(key, region).to(dtype)

    return TensorPlan(dtype, shape, chunks, _PREFIX + key)

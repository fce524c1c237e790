"""The exporter of a PEFT directory: adapters alone, for peft, vLLM and whatever reads those.

A fused linear has one A; each Hugging Face module made of some of its rows gets a copy of that, and the
rows of B that are its own: the same function. Tensors have the dtype in which they were trained.

Sources: peft 0.17 `utils/save_and_load.py`, `tuners/lora/config.py`.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mqat.checkpoints.reader import CheckpointReader
from mqat.errors import UserError
from mqat.export.exporter import PRODUCER, DirectoryContents, ExportOptions
from mqat.export.reshard import InferenceRank, linear_rows
from mqat.export.stream import TensorPlan
from mqat.export.writer import PRODUCER_FILE
from mqat.models.adapters import Adapters
from mqat.models.decoder import DecoderConfig
from mqat.models.schemes import Scheme
from mqat.models.structure import adapter_key, split_name

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


class PeftExporter:
    """`adapter_config.json` and `adapter_model.safetensors`."""

    format = "peft"
    style = None
    output_name = "adapter"
    is_served = False

    def check(
        self, model: DecoderConfig, schemes: Mapping[str, Scheme], options: ExportOptions
    ) -> None:
        """As `Exporter.check`."""
        options.refuse_parts(self.format, "adapters are whole")
        if any(linear.is_transposed_in_hf for linear in model.linears):
            raise UserError(
                f"export.format=peft: a {model.family} model of Hugging Face has its weights transposed "
                "(Conv1D), whose adapters are not written here; train with model.peft.merge=true and "
                "export the model."
            )

    def warning(self, schemes: Mapping[str, Scheme]) -> str | None:
        """As `Exporter.warning`."""
        return None

    def contents(
        self, reader: CheckpointReader, tokenizer: Path, options: ExportOptions
    ) -> DirectoryContents:
        """As `Exporter.contents`."""
        adapters = reader.adapters
        if adapters is None:
            raise UserError(
                f"{reader.path}: holds no adapters (or merged ones); export.format=hf writes the model."
            )
        if adapters.is_merged:
            raise UserError(
                f"{reader.path}: its adapters are quantized with the weights, so that beside them they "
                "would be another model; export the merged checkpoint at the end of the run instead."
            )
        modules = _modules(reader.model, adapters)
        texts = {
            _CONFIG: _config(reader.model, adapters, modules),
            PRODUCER_FILE: {"producer": PRODUCER},
        }
        plans = [plan for name in adapters.names for plan in _plans(reader, name)]
        return DirectoryContents({_WEIGHTS: partial(list, plans)}, texts)


def _modules(model: DecoderConfig, adapters: Adapters) -> list[str]:
    """Hugging Face names of what has an adapter."""
    found = []
    for name in adapters.names:
        layer, short = split_name(name)
        prefix = model.architecture.hf_layer.format(i=layer)
        found += [prefix + module for module in model.linear(short).hf_modules()]
    return found


def _config(model: DecoderConfig, adapters: Adapters, modules: list[str]) -> dict[str, Any]:
    kinds = sorted({name.rpartition(".")[2] for name in modules})
    everywhere = _modules_called(model, kinds)
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None,
        "r": adapters.rank, "lora_alpha": adapters.alpha, "lora_dropout": adapters.dropout,
        "target_modules": kinds if len(modules) == everywhere else sorted(modules),
        "bias": "none", "fan_in_fan_out": False, "use_rslora": False, "use_dora": False,
        "init_lora_weights": True, "inference_mode": True, "modules_to_save": None,
    }  # fmt: skip


def _modules_called(model: DecoderConfig, kinds: list[str]) -> int:
    """How many modules a reader would find under these last parts of their names."""
    return sum(
        module.rpartition(".")[2] in kinds
        for layer in range(model.num_layers)
        for linear in model.linears_of(layer)
        for module in linear.hf_modules()
    )


def _plans(reader: CheckpointReader, name: str) -> Iterator[TensorPlan]:
    model, (layer, short) = reader.model, split_name(name)
    linear = model.linear(short)
    prefix = "base_model.model." + model.architecture.hf_layer.format(i=layer)
    a, b = adapter_key(name, "in"), adapter_key(name, "out")
    for module, parts in linear.hf_modules().items():
        rows = linear_rows(model, linear, parts, InferenceRank())
        count = sum(span.stop - span.start for span in rows)
        rank, columns = reader.shape(a)

        def chunks_of_a() -> Iterator[Tensor]:
            yield reader.view(a)

        def chunks_of_b(rows: list[slice] = rows) -> Iterator[Tensor]:
            yield torch.cat([reader.view(b, (span,)) for span in rows])

        dtype = reader.dtype(a)
        yield TensorPlan(dtype, (rank, columns), chunks_of_a, f"{prefix}{module}.lora_A.weight")
        yield TensorPlan(dtype, (count, rank), chunks_of_b, f"{prefix}{module}.lora_B.weight")

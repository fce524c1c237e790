"""A model opened for looking at it: any source, any layout, no training."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mqat.checkpoints.dist_checkpoint import checkpoint_layers, load_checkpoint
from mqat.checkpoints.manifest import DESCRIPTION
from mqat.checkpoints.reader import CheckpointReader
from mqat.checkpoints.source import PretrainedSource, open_pretrained
from mqat.config import ModelConfig
from mqat.data.tokenizer import check_fits, load_tokenizer
from mqat.errors import UserError
from mqat.models.adapters import Adapters
from mqat.models.decoder import DecoderConfig
from mqat.parallel.layout import check_group_sizes, check_parallel_sizes
from mqat.runtime import groups


@dataclass(frozen=True)
class LoadedModel:
    """Model chunks of this rank, in evaluation mode, with the tokenizer that belongs to them."""

    chunks: list[Any]
    config: DecoderConfig
    tokenizer: Any


def load_model(
    path: Path,
    *,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    expert_parallel: int = 1,
    sequence_parallel: bool = False,
    precision: str = "32",
    lowered: bool = False,
    compiled: bool = False,
    pretrained: PretrainedSource | None = None,
) -> LoadedModel:
    """Creates process groups and loads an mqat checkpoint, or what `open_pretrained` opens.

    A quantized checkpoint computes as it was trained, with its frozen scales.

    Args:
        path: What to open.
        tensor_parallel: Of this session.
        pipeline_parallel: Of this session.
        expert_parallel: Of this session.
        sequence_parallel: Of this session.
        precision: `32` or `bf16`.
        lowered: Store and multiply low-precision weights (`parallel.pack_weights`).
        compiled: Have `torch.compile` translate the layers when they first run, if lowered.
        pretrained: The same, if it is open already.

    Raises:
        ValueError: Nothing readable there, or sizes that do not fit; on every rank.
    """
    source: PretrainedSource | CheckpointReader
    adapters: Adapters | None = None
    if pretrained is None and (path / DESCRIPTION).exists():
        source = CheckpointReader(path, crc="none")
        config, layers = source.model, checkpoint_layers(source.description)
        adapters = source.adapters
        tokenizer = load_tokenizer(path / "tokenizer")
    else:
        source = pretrained or open_pretrained(path)
        config, layers = source.config, {}
        tokenizer = load_tokenizer(source.tokenizer_source)
    if lowered and adapters is not None and adapters.is_merged:
        raise UserError(
            f"{path}: its adapters are not merged yet; lower the checkpoint of the end of the run."
        )
    if lowered and isinstance(source, CheckpointReader) and source.is_packed:
        raise UserError(f"{path}: is packed already; leave out --lowered.")
    if lowered and not layers:
        raise UserError(f"{path}: is not quantized, so there is nothing to lower.")
    check_fits(tokenizer, config.vocab_size)
    check_parallel_sizes(config, tp=tensor_parallel, pp=pipeline_parallel, ep=expert_parallel)
    check_group_sizes(config, layers, tp=tensor_parallel, purpose="tensor_parallel")
    groups.initialize(
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        expert_parallel=expert_parallel,
    )
    # Megatron can be imported only after the groups' device is prepared.
    from mqat.checkpoints.pretrained import load_pretrained_
    from mqat.specs.model import build_model

    settings = ModelConfig(
        tensor_model_parallel_size=tensor_parallel,
        pipeline_model_parallel_size=pipeline_parallel,
        expert_model_parallel_size=expert_parallel,
        sequence_parallel=sequence_parallel,
    )
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    is_packed = isinstance(source, CheckpointReader) and source.is_packed
    chunks = build_model(config, settings, layers, dtype, is_packed=is_packed)
    if adapters is not None:
        from mqat.parallel.add_adapters import add_adapters_

        add_adapters_(chunks, adapters)
    if isinstance(source, CheckpointReader):
        load_checkpoint(path, chunks, layers=layers, adapters=adapters)
    else:
        with groups.on_all_ranks():
            load_pretrained_(chunks, source)
    if lowered:
        from mqat.parallel.pack_weights import compile_layers_, pack_weights_

        pack_weights_(chunks)
        if compiled:
            compile_layers_(chunks)
    for chunk in chunks:
        chunk.eval()
    return LoadedModel(list(chunks), config, tokenizer)

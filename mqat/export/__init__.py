"""From a checkpoint of any training layout to a directory for any inference layout."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

from mqat.export.reshard import InferenceRank
from mqat.export.slices import CheckpointReader
from mqat.export.trtllm import RankTensors, check_exportable, config_json, loader_warning
from mqat.export.writer import Agree, AtomicDirectory, raise_alone
from mqat.parallel.layout import check_group_sizes

__all__ = ["export_trtllm"]


def export_trtllm(
    checkpoint: Path,
    out: Path,
    *,
    tensor_parallel: int,
    pipeline_parallel: int = 1,
    dtype: str = "bfloat16",
    overwrite: bool = False,
    rank: int = 0,
    world_size: int = 1,
    agree: Agree = raise_alone,
) -> None:
    """Writes a TensorRT-LLM checkpoint directory: config, one file per inference rank, tokenizer.

    Needs neither Megatron nor a process group; several processes share the rank files and produce
    the same bytes as one.

    Args:
        checkpoint: mqat checkpoint, saved at any layout.
        out: Directory to create.
        tensor_parallel: Inference tensor-parallel size.
        pipeline_parallel: Inference pipeline-parallel size.
        dtype: Of unquantized tensors: `bfloat16`, `float16` or `float32`.
        overwrite: Replace an existing directory.
        rank: This process, of `world_size` that call this function together.
        world_size: Number of processes.
        agree: Waits for all of them and spreads errors (`mqat.runtime.groups.agree`).

    Raises:
        ValueError: Damaged checkpoint, sizes that do not fit, an algorithm without TensorRT-LLM form,
            an existing directory, or a full disk. Nothing is left behind.
    """
    reader = CheckpointReader(checkpoint, crc=rank == 0)
    tp, pp = tensor_parallel, pipeline_parallel
    purpose = "export.inference_tensor_parallel"
    check_group_sizes(reader.model, reader.layers, tp=tp, purpose=purpose)
    check_exportable(reader.model, reader.layers, tp=tp, pp=pp)
    warning = loader_warning(reader.layers)
    if warning is not None and rank == 0:
        warnings.warn(warning, stacklevel=2)
    directory = AtomicDirectory(out, overwrite=overwrite, rank=rank, agree=agree)
    error: Exception | None = None
    try:
        for index in range(rank, tp * pp, world_size):
            position = InferenceRank(index % tp, tp, index // tp, pp)
            tensors = dict(RankTensors(reader, position, dtype))
            directory.write_tensors(f"rank{index}.safetensors", tensors)
        if rank == 0:
            config = config_json(reader.model, reader.layers, tp=tp, pp=pp, dtype=dtype)
            directory.write_text("config.json", json.dumps(config, indent=2) + "\n")
            directory.copy_from(checkpoint / "tokenizer")
    except (ValueError, OSError) as caught:
        error = caught
    try:
        agree(error)
    except ValueError:
        directory.discard()
        raise
    directory.commit()

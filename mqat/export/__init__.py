"""From a checkpoint of any training layout to a directory for any inference layout."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mqat.export.reshard import InferenceRank
from mqat.export.slices import CheckpointReader
from mqat.export.trtllm import (
    DTYPES,
    RankTensors,
    check_exportable,
    config_json,
    loader_warning,
)
from mqat.export.writer import AtomicDirectory

__all__ = ["Agree", "export_trtllm"]

# Waits for all processes; if any passes an error, all raise it (`mqat.runtime.groups.agree`).
Agree = Callable[[Exception | None], None]


def _raise_alone(error: Exception | None) -> None:
    """The agreement of a single process."""
    if error is not None:
        raise error


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
    agree: Agree = _raise_alone,
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
        overwrite: Replace an existing export.
        rank: This process, of `world_size` that call this function together.
        world_size: Number of processes.
        agree: Waits for all of them and spreads errors (`mqat.runtime.groups.agree`).

    Raises:
        ValueError: Damaged checkpoint, sizes that do not fit, an algorithm that TensorRT-LLM lacks,
            an existing directory, or a full disk. Nothing is left behind.
    """
    tp, pp = tensor_parallel, pipeline_parallel
    with _together(agree):
        if dtype not in DTYPES:
            raise ValueError(f"export.dtype={dtype!r}: must be one of {', '.join(DTYPES)}.")
        reader = CheckpointReader(checkpoint, crc=rank == 0)
        check_exportable(reader.model, reader.layers, tp=tp, pp=pp)
        directory = AtomicDirectory(out, overwrite=overwrite)
    warning = loader_warning(reader.layers)
    if warning is not None and rank == 0:
        warnings.warn(warning, stacklevel=2)
    try:
        with _together(agree):
            if rank == 0:
                directory.create()
        with _together(agree):
            for index in range(rank, tp * pp, world_size):
                position = InferenceRank(index % tp, tp, index // tp, pp)
                tensors = dict(RankTensors(reader, position, dtype))
                directory.write_tensors(f"rank{index}.safetensors", tensors)
            if rank == 0:
                directory.copy_tree(checkpoint / "tokenizer")
                config = config_json(reader.model, reader.layers, tp=tp, pp=pp, dtype=dtype)
                directory.write_text("config.json", json.dumps(config, indent=2) + "\n")
        with _together(agree):
            if rank == 0:
                directory.commit()
    except BaseException:
        if rank == 0:
            directory.discard()
        raise


@contextmanager
def _together(agree: Agree) -> Iterator[None]:
    """A phase that all processes finish before any goes on; a failure of one is raised by all."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    agree(failure)

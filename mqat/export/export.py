"""From a checkpoint of any training layout to a directory for any inference layout and server."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from mqat.checkpoints.manifest import checking_data
from mqat.checkpoints.reader import CheckpointReader
from mqat.errors import UserError
from mqat.export import huggingface, kv_cache, qnemo, tables, trtllm
from mqat.export.rank_files import plan_rank
from mqat.export.reshard import InferenceRank
from mqat.export.stream import TensorPlan
from mqat.export.writer import AtomicDirectory

__all__ = ["Agree", "export_hf", "export_trtllm"]

# Waits for all processes; if any passes an error, all raise it (`runtime.groups.raise_on_any_rank`).
Agree = Callable[[Exception | None], None]


def _raise_alone(error: Exception | None) -> None:
    """The agreement of a single process."""
    if error is not None:
        raise error


@dataclass(frozen=True)
class _Contents:
    """A directory before it exists: weight files planned when they are written, and small texts."""

    weights: Mapping[str, Callable[[], list[TensorPlan]]]
    texts: dict[str, str]
    warning: str | None = None


def export_trtllm(
    checkpoint: Path,
    out: Path,
    *,
    tensor_parallel: int,
    pipeline_parallel: int = 1,
    dtype: str = "bfloat16",
    allow_requantization: bool = False,
    archive: str | None = None,
    overwrite: bool = False,
    rank: int = 0,
    world_size: int = 1,
    raise_on_any_rank: Agree = _raise_alone,
) -> None:
    """Writes a TensorRT-LLM checkpoint: config, one file per inference rank, tokenizer.

    Needs neither Megatron nor a process group; several processes share the rank files and produce
    the same bytes as one. Memory does not grow with the model.

    Args:
        checkpoint: mqat checkpoint, saved at any layout.
        out: Directory to create (a file with `archive="tar"`).
        tensor_parallel: Inference tensor-parallel size.
        pipeline_parallel: Inference pipeline-parallel size.
        dtype: Of unquantized tensors: `bfloat16`, `float16` or `float32`.
        allow_requantization: Export algorithms that the loader rounds a second time (`int8_wo`).
        archive: None, or a `.qnemo` for NeMo: `directory`, or `tar` for its older releases.
        overwrite: Replace an existing export.
        rank: This process, of `world_size` that call this function together.
        world_size: Number of processes.
        raise_on_any_rank: Waits for all of them and spreads errors (as in `mqat.runtime.groups`).

    Raises:
        ValueError: Damaged checkpoint, sizes that do not fit, an algorithm that TensorRT-LLM lacks,
            an existing directory, or a full disk. Nothing is left behind.
    """
    tp, pp = tensor_parallel, pipeline_parallel

    def contents(reader: CheckpointReader) -> _Contents:
        model, layers = reader.model, reader.layers
        kv_cache.check_exportable(reader.kv_cache, layers, target="trtllm")
        trtllm.check_exportable(
            model, layers, tp=tp, pp=pp, allow_requantization=allow_requantization
        )
        weights: dict[str, Callable[[], list[TensorPlan]]] = {}
        for index in range(tp * pp):
            position = InferenceRank(index % tp, tp, index // tp, pp)
            weights[f"rank{index}.safetensors"] = partial(
                plan_rank, reader, position, getattr(torch, dtype)
            )
        cache = kv_cache.quant_algo(reader.kv_cache)
        config = trtllm.config_json(model, layers, tp=tp, pp=pp, dtype=dtype, kv_cache=cache)
        texts = {"config.json": config}
        mixed = trtllm.quant_cfg_json(model, layers, pp=pp, kv_cache=cache)
        if mixed is not None:
            texts["quant_cfg.json"] = mixed
        text = {name: json.dumps(value, indent=2) + "\n" for name, value in texts.items()}
        if archive is not None:
            text |= qnemo.tokenizer_texts(checkpoint / "tokenizer")
        return _Contents(weights, text, trtllm.loader_warning(layers))

    _export(
        checkpoint,
        out,
        contents,
        dtype,
        archive == "tar",
        overwrite,
        rank,
        world_size,
        raise_on_any_rank,
    )


def export_hf(
    checkpoint: Path,
    out: Path,
    *,
    style: str = "compressed-tensors",
    dtype: str = "bfloat16",
    max_shard_bytes: int = huggingface.SHARD_BYTES,
    overwrite: bool = False,
    rank: int = 0,
    world_size: int = 1,
    raise_on_any_rank: Agree = _raise_alone,
) -> None:
    """Writes a Hugging Face directory: for transformers, vLLM, SGLang, TensorRT-LLM's PyTorch backend.

    An unquantized checkpoint becomes an ordinary model directory, with the tensors of the one that
    was imported. Several processes share the shards and produce the same bytes as one.

    Args:
        checkpoint: mqat checkpoint, saved at any layout.
        out: Directory to create.
        style: Of quantized tensors: `compressed-tensors` or `modelopt`.
        dtype: Of unquantized tensors: `bfloat16`, `float16` or `float32`.
        max_shard_bytes: Most bytes of tensors in a file; a larger tensor gets a file of its own.
        overwrite: Replace an existing export.
        rank: This process, of `world_size` that call this function together.
        world_size: Number of processes.
        raise_on_any_rank: Waits for all of them and spreads errors (as in `mqat.runtime.groups`).

    Raises:
        ValueError: Damaged checkpoint, an algorithm that the style lacks, an existing directory, or
            a full disk. Nothing is left behind.
    """

    def contents(reader: CheckpointReader) -> _Contents:
        huggingface.check_exportable(reader.model, reader.layers, style=style)
        kv_cache.check_exportable(reader.kv_cache, reader.layers, target=style)
        plans = huggingface.plan_tensors(reader, getattr(torch, dtype), style)
        shards = huggingface.shard(plans, max_shard_bytes)
        tokenizer = checkpoint / "tokenizer"
        texts = huggingface.texts(
            reader.model, reader.layers, dtype, style, tokenizer, shards, reader.kv_cache
        )
        return _Contents({name: partial(list, plans) for name, plans in shards.items()}, texts)

    _export(checkpoint, out, contents, dtype, False, overwrite, rank, world_size, raise_on_any_rank)


def _export(
    checkpoint: Path,
    out: Path,
    contents: Callable[[CheckpointReader], _Contents],
    dtype: str,
    as_tar: bool,
    overwrite: bool,
    rank: int,
    world_size: int,
    raise_on_any_rank: Agree,
) -> None:
    """The part that all formats share: check, write side by side, appear whole."""
    with _together(raise_on_any_rank):
        if dtype not in trtllm.DTYPES:
            raise UserError(f"export.dtype={dtype!r}: must be one of {', '.join(trtllm.DTYPES)}.")
        reader = CheckpointReader(checkpoint, crc="index" if rank == 0 else "none")
        tables.check_exportable(reader.tables)
        planned = contents(reader)
        directory = AtomicDirectory(out, overwrite=overwrite, as_tar=as_tar)
    if planned.warning is not None and rank == 0:
        warnings.warn(planned.warning, stacklevel=3)
    try:
        with _together(raise_on_any_rank):
            if rank == 0:
                directory.create()
        checking = checking_data(checkpoint, reader.description) if rank == 0 else nullcontext()
        with _together(raise_on_any_rank), checking:
            for name in list(planned.weights)[rank::world_size]:
                directory.write_tensors(name, planned.weights[name]())
            if rank == 0:
                directory.copy_tree(checkpoint / "tokenizer")
                for name, text in planned.texts.items():
                    directory.write_text(name, text)
        with _together(raise_on_any_rank):
            if rank == 0:
                directory.commit()
    except BaseException:
        if rank == 0:
            directory.discard()
        raise


@contextmanager
def _together(raise_on_any_rank: Agree) -> Iterator[None]:
    """A phase that all processes finish before any goes on; a failure of one is raised by all."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    raise_on_any_rank(failure)

"""From a checkpoint of any training layout to a directory for any inference layout and server."""

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from mqat.checkpoints.manifest import checking_data
from mqat.checkpoints.reader import CheckpointReader
from mqat.errors import UserError
from mqat.export.exporter import Exporter, ExportOptions
from mqat.export.exporters import exporter
from mqat.export.stream import TensorPlan
from mqat.export.writer import AtomicDirectory
from mqat.models.schemes import Scheme

__all__ = ["Agree", "export_checkpoint", "export_hf", "export_trtllm"]

# Waits for all processes; if any passes an error, all raise it (`runtime.groups.raise_on_any_rank`).
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
    allow_requantization: bool = False,
    archive: str | None = None,
    overwrite: bool = False,
    rank: int = 0,
    world_size: int = 1,
    raise_on_any_rank: Agree = _raise_alone,
) -> None:
    """Writes a TensorRT-LLM checkpoint: config, one file per inference rank, tokenizer.

    Arguments and errors are those of `ExportOptions` and `export_checkpoint`.
    """
    options = ExportOptions(
        tensor_parallel, pipeline_parallel, dtype, allow_requantization, archive
    )
    how = (overwrite, rank, world_size, raise_on_any_rank)
    export_checkpoint(exporter("trtllm"), checkpoint, out, options, *how)


def export_hf(
    checkpoint: Path,
    out: Path,
    *,
    style: str | None = None,
    dtype: str = "bfloat16",
    max_shard_bytes: int | None = None,
    overwrite: bool = False,
    rank: int = 0,
    world_size: int = 1,
    raise_on_any_rank: Agree = _raise_alone,
) -> None:
    """Writes a Hugging Face directory: for transformers, vLLM, SGLang, TensorRT-LLM's PyTorch backend.

    An unquantized checkpoint becomes an ordinary model directory, with the tensors of the one that
    was imported. `style`, of quantized tensors: `compressed-tensors` (None) or `modelopt`; other
    arguments and errors are those of `ExportOptions` and `export_checkpoint`.
    """
    options = ExportOptions(dtype=dtype, max_shard_bytes=max_shard_bytes)
    how = (overwrite, rank, world_size, raise_on_any_rank)
    export_checkpoint(exporter("hf", style), checkpoint, out, options, *how)


def export_checkpoint(
    exporter: Exporter,
    checkpoint: Path,
    out: Path,
    options: ExportOptions,
    overwrite: bool = False,
    rank: int = 0,
    world_size: int = 1,
    raise_on_any_rank: Agree = _raise_alone,
) -> None:
    """Writes the directory of one exporter.

    Needs neither Megatron nor a process group; several processes share the weight files and produce
    the same bytes as one. Memory does not grow with the model.

    Args:
        exporter: From `exporters.exporter`.
        checkpoint: mqat checkpoint, saved at any layout.
        out: Directory to create (a file with `archive="tar"`).
        options: What the exporter reads.
        overwrite: Replace an existing export.
        rank: This process, of `world_size` that call this function together.
        world_size: Number of processes.
        raise_on_any_rank: Waits for all of them and spreads errors (as in `mqat.runtime.groups`).

    Raises:
        UserError: Damaged checkpoint, sizes or operands that the exporter refuses, an existing
            directory, or a full disk. Nothing is left behind.
    """
    tokenizer = checkpoint / "tokenizer"
    with _together(raise_on_any_rank):
        reader = CheckpointReader(checkpoint, crc="index" if rank == 0 else "none")
        schemes: dict[str, Scheme] = {**reader.layers, **reader.tables, **reader.kv_cache}
        exporter.check(reader.model, schemes, options)
        _check_adapters(reader, exporter, warns=rank == 0)
        contents = exporter.contents(reader, tokenizer, options)
        directory = AtomicDirectory(out, overwrite=overwrite, as_tar=contents.as_tar)
    with _together(raise_on_any_rank):
        for name in list(contents.weights)[rank::world_size]:
            _check_range(contents.weights[name](), options.dtype)
    warning = exporter.warning(schemes)
    if warning is not None and rank == 0:
        warnings.warn(warning, stacklevel=3)
    try:
        with _together(raise_on_any_rank):
            if rank == 0:
                directory.create()
        checking = checking_data(checkpoint, reader.description) if rank == 0 else nullcontext()
        with _together(raise_on_any_rank), checking:
            for name in list(contents.weights)[rank::world_size]:
                directory.write_tensors(name, contents.weights[name](), contents.write)
            if rank == 0:
                directory.copy_tree(tokenizer)
                for name, value in contents.texts.items():
                    is_text = isinstance(value, str | bytes)
                    text = value if is_text else json.dumps(value, indent=2) + "\n"
                    directory.write_text(name, text)
        with _together(raise_on_any_rank):
            if rank == 0:
                directory.commit()
    except BaseException:
        if rank == 0:
            directory.discard()
        raise


def _check_adapters(reader: CheckpointReader, exporter: Exporter, *, warns: bool) -> None:
    """Refuses a model whose weights lack what was trained; says where adapters are left out."""
    adapters = reader.adapters
    if exporter.format != "peft" and reader.is_packed:
        raise UserError(
            f"{reader.path}: its weights are packed; only its adapters are exported (--format peft), "
            "export the base from the checkpoint that it was packed from."
        )
    if adapters is None or exporter.format == "peft":
        return
    if adapters.is_merged:
        raise UserError(
            f"{reader.path}: its adapters are not merged yet into the weights that are quantized with "
            "them; export the checkpoint of the end of the run."
        )
    if not warns:
        return
    warnings.warn(
        f"{reader.path}: its adapters are not part of a directory of {exporter.format}, which holds the "
        "model that they are served beside; export.format=peft (--format peft) writes them.",
        stacklevel=4,
    )


def _check_range(plans: Sequence[TensorPlan], dtype: str) -> None:
    """Refuses what float16 cannot hold before anything is written.

    Raises:
        UserError: Names the first tensor with an element beyond 65504, or with steps that an engine
            would round.
    """
    if dtype != "float16":
        return  # the others reach as far as what was trained
    # Those of float32 are scales, some of which are refused by what builds them.
    narrow = [plan for plan in plans if plan.dtype in (torch.float16, torch.float32)]
    for plan in narrow:
        if any(bool(chunk.isinf().any()) for chunk in plan.chunks()):
            raise UserError(
                f"{plan.name}: has elements beyond 65504, float16's largest number; use "
                "export.dtype=bfloat16 (--dtype bfloat16) or float32."
            )


@contextmanager
def _together(raise_on_any_rank: Agree) -> Iterator[None]:
    """A phase that all processes finish before any goes on; a failure of one is raised by all."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    raise_on_any_rank(failure)

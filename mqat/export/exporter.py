"""What an exporter is: it refuses before training, and describes a directory before it exists."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from mqat import __version__
from mqat.checkpoints.reader import CheckpointReader
from mqat.errors import UserError
from mqat.export.stream import TensorPlan, write_safetensors
from mqat.models.decoder import DecoderConfig
from mqat.models.schemes import Scheme

DTYPES = ("bfloat16", "float16", "float32")


PRODUCER = {"name": "mqat", "version": __version__}  # of a directory, in its `config.json`


@dataclass(frozen=True)
class ExportOptions:
    """What a user chooses; each exporter reads what concerns it and refuses what it cannot honour.

    Attributes:
        tensor_parallel: Inference tensor-parallel size.
        pipeline_parallel: Inference pipeline-parallel size.
        dtype: Of unquantized tensors: `bfloat16`, `float16` or `float32`.
        allow_requantization: Export forms that the loader rounds a second time.
        archive: None, or a `.qnemo` for NeMo: `directory`, or `tar` for its older releases.
        max_shard_bytes: Most bytes of tensors in a file; a larger tensor gets a file of its own. None:
            the exporter's own.
    """

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    dtype: str = "bfloat16"
    allow_requantization: bool = False
    archive: str | None = None
    max_shard_bytes: int | None = None

    def __post_init__(self) -> None:
        """Raises UserError for a dtype that no server has."""
        if self.dtype not in DTYPES:
            raise UserError(f"export.dtype={self.dtype!r}: must be one of {', '.join(DTYPES)}.")

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of unquantized tensors."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def refuse_parts(self, format_: str, reason: str) -> None:
        """For formats that are written whole: raises UserError where parts are chosen."""
        layout, others = (
            (self.tensor_parallel, self.pipeline_parallel),
            (self.archive, self.max_shard_bytes),
        )
        if layout != (1, 1) or others != (None, None) or self.allow_requantization:
            raise UserError(
                f"export.format={format_}: {reason}; leave out inference sizes (--inference-tp, "
                "--inference-pp), --qnemo, --max-shard-gb and --allow-requantization."
            )


@dataclass(frozen=True)
class DirectoryContents:
    """A directory before it exists.

    Attributes:
        weights: File name -> its tensors, planned when they are about to be written.
        texts: File name -> JSON object, text or bytes.
        as_tar: All of it is to become one file (`tar.py`).
        write: Makes a file of tensors.
    """

    weights: Mapping[str, Callable[[], list[TensorPlan]]]
    texts: Mapping[str, Any] = field(default_factory=dict)
    as_tar: bool = False
    write: Callable[[Path, Sequence[TensorPlan]], None] = write_safetensors


class Exporter(Protocol):
    """Writes directories of one form; `exporters.EXPORTERS` lists them all."""

    @property
    def format(self) -> str:
        """Value of `export.format`."""

    @property
    def style(self) -> str | None:
        """Value of `export.style`, where a format has several."""

    @property
    def output_name(self) -> str:
        """What it writes into a run directory."""

    @property
    def is_served(self) -> bool:
        """Whether it is for serving, and `mqat verify` runs it."""

    def check(
        self, model: DecoderConfig, schemes: Mapping[str, Scheme], options: ExportOptions
    ) -> None:
        """Refuses what the directory cannot hold; runs before training, and again before exporting.

        `schemes` are those of linears, vocabulary tables and caches, by global name.

        Raises:
            UserError: Names the setting or the linear with its operands, and what would work.
        """

    def warning(self, schemes: Mapping[str, Scheme]) -> str | None:
        """What the user must know of what servers change, or None."""

    def contents(
        self, reader: CheckpointReader, tokenizer: Path, options: ExportOptions
    ) -> DirectoryContents:
        """The directory of a checkpoint that passed `check`; `tokenizer` is copied beside it."""

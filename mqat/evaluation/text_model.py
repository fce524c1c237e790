"""What text is scored by and generated with: a Megatron model at any layout, or an export.

| what is opened                                | computes                                         |
|-----------------------------------------------|--------------------------------------------------|
| mqat checkpoint, or what `open_pretrained` | Megatron model: TP x PP, requests shared over DP |
| mqat checkpoint, `lowered`                    | the same with stored low-precision weights       |
| exported directory or .qnemo                  | verify's reader, requests shared over processes  |
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mqat.checkpoints.archive import unpacked
from mqat.checkpoints.load_model import load_model
from mqat.data.tokenizer import end_tokens, load_tokenizer
from mqat.errors import UserError
from mqat.runtime import groups
from mqat.verify.decoder import Decoder, Past
from mqat.verify.verify import is_export, open_export


class TextModel(Protocol):
    """A model of text, the same on all ranks that share it.

    Attributes:
        tokenizer: Its own.
        longest: Tokens that a sequence may have.
        ends: Ids at which generated text ends.
        share: Number of this copy of the model and how many there are: who computes which requests.
    """

    tokenizer: Any
    longest: int
    ends: frozenset[int]
    share: tuple[int, int]

    def score(
        self, tokens: Tensor, rows: Tensor, places: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `evaluation.chosen.score_chosen`."""

    def continued(self, count: int, capacity: int, *, cached: bool) -> AbstractContextManager[Any]:
        """Passes that continue `count` sequences of up to `capacity` tokens (`evaluation.cached`)."""


class MegatronText:
    """Of chunks of this rank, all of which take part in every call."""

    def __init__(self, chunks: Sequence[Any], tokenizer: Any, stated_ends: Any = None) -> None:
        from megatron.core import parallel_state

        from mqat.parallel.parameter_sync import gather_parameters
        from mqat.parallel.quantized_module import unwrapped

        gather_parameters(chunks)  # which waits for all copies: some may get no request
        self.chunks, self.tokenizer = chunks, tokenizer
        self.longest = int(unwrapped(chunks)[0].max_sequence_length)
        self.ends = end_tokens(tokenizer, stated_ends)
        self.share = (
            parallel_state.get_data_parallel_rank(with_context_parallel=True),
            parallel_state.get_data_parallel_world_size(with_context_parallel=True),
        )
        if parallel_state.get_expert_model_parallel_world_size() > 1:
            self.share = 0, 1  # copies share experts and wait for each other: all compute the same

    def score(
        self, tokens: Tensor, rows: Tensor, places: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `TextModel`."""
        from mqat.evaluation.chosen import score_chosen

        return score_chosen(self.chunks, tokens, rows, places, targets)

    @contextmanager
    def continued(self, count: int, capacity: int, *, cached: bool) -> Iterator[Any]:
        """As `TextModel`."""
        from mqat.evaluation.cached import continued, recomputed

        if not cached:
            with recomputed(self.chunks, count) as passes:
                yield passes
            return
        with continued(self.chunks, count, capacity) as (passes, _):
            yield passes


class ExportedText:
    """Of an exported directory, which this process reads alone."""

    def __init__(self, decoder: Decoder, tokenizer: Any) -> None:
        self.decoder, self.tokenizer = decoder, tokenizer
        self.longest = int(decoder.max_positions)
        self.ends = end_tokens(tokenizer, decoder.model.raw.get("eos_token_id"))
        self.share = groups.rank_in_world()

    def score(
        self, tokens: Tensor, rows: Tensor, places: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `TextModel`."""
        logits = self.decoder.logits(tokens)[rows, places]
        return logits.log_softmax(dim=-1).gather(1, targets), logits.argmax(dim=-1)

    @contextmanager
    def continued(self, count: int, capacity: int, *, cached: bool) -> Iterator[Any]:
        """As `TextModel`; each row is computed alone."""
        rows = [_ExportedRow(self.decoder, cached) for _ in range(count)]

        def passes(new: Sequence[Sequence[int]]) -> Tensor:
            return torch.stack([row(tokens) for row, tokens in zip(rows, new, strict=True)])

        yield passes


@dataclass
class _ExportedRow:
    decoder: Decoder
    cached: bool

    def __post_init__(self) -> None:
        self.held: list[int] = []
        self.past, self.logits = Past(), torch.empty(0)

    def __call__(self, new: Sequence[int]) -> Tensor:
        """Next-token logits [V]."""
        if not new:
            return self.logits
        before, short = len(self.held), self.decoder.model.positions.switching_length
        self.held += new
        if short is not None and before <= short < len(self.held):
            before, self.past = 0, Past()  # what was kept was turned otherwise
        tokens = self.held[before if self.cached else 0 :]
        past = self.past if self.cached else None
        self.logits = self.decoder.logits(torch.tensor([tokens]), past=past)[0, -1]
        return self.logits


@contextmanager
def open_text_model(
    path: Path,
    *,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    precision: str = "32",
    lowered: bool = False,
    compiled: bool = False,
    keeps_weights: bool = False,
) -> Iterator[TextModel]:
    """Opens whatever can be scored or continued; creates process groups.

    Args:
        path: Checkpoint, Hugging Face directory, GGUF, export or .qnemo.
        tensor_parallel: Of this session; further processes share requests.
        pipeline_parallel: Of this session.
        precision: Of a Megatron model: `32` or `bf16`.
        lowered: As `load_model`.
        compiled: As `load_model`.
        keeps_weights: Of an export: hold all weights in float32, to compute token by token; otherwise
            each is read when it is used, one in memory at a time.

    Raises:
        UserError: Nothing readable there, or an export with options of Megatron models.
    """
    with unpacked(path) if path.suffix == ".qnemo" else nullcontext(path) as directory:
        if not is_export(directory):
            model = load_model(
                directory, tensor_parallel=tensor_parallel, pipeline_parallel=pipeline_parallel,
                precision=precision, lowered=lowered, compiled=compiled,
            )  # fmt: skip
            yield MegatronText(
                model.chunks, model.tokenizer, model.config.token_ids.get("eos_token_id")
            )
            return
        if lowered or compiled or precision != "32" or tensor_parallel * pipeline_parallel > 1:
            raise UserError(
                f"{path}: --lowered, --compile, --precision, --tensor-parallel and --pipeline-parallel "
                "are for checkpoints; this is an export, which each process reads whole and computes "
                "in float32."
            )
        if groups.world_size() > 1:
            groups.join("gloo")
        decoder = open_export(directory, keeps_weights=keeps_weights)
        yield ExportedText(decoder, load_tokenizer(directory))

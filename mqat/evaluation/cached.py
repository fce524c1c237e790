"""Sequences continued by a Megatron model that keeps their keys and values (`specs/decoding.py`)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mqat.errors import UserError
from mqat.evaluation.chosen import (
    Chosen,
    chosen_logits,
    from_last_stage,
    looking_at,
    padding_multiple,
    whole_vocabulary,
)
from mqat.evaluation.forward import true_vocab_size
from mqat.parallel.attention import KvCacheAttention
from mqat.parallel.quantized_module import unwrapped
from mqat.runtime.groups import device
from mqat.specs.backend import SdpaAttention
from mqat.specs.decoding import LayerCache, RowAngles, Rows
from mqat.specs.rope import switching_length

# The next tokens of each row (none: it waits) -> next-token logits of all rows, float32 [b, V].
Continue = Callable[[Sequence[Sequence[int]]], Tensor]
_POSITIONS = ("rope", "learned_absolute", "none")


def _attentions(models: Sequence[Any]) -> list[tuple[SdpaAttention, KvCacheAttention | None]]:
    """Core attentions of this rank, and what quantizes their cache.

    Raises:
        UserError: One that cannot keep keys and values, or positions that cannot differ by row.
    """
    found = []
    for model in models:
        if model.position_embedding_type not in _POSITIONS or model.config.apply_rope_fusion:
            raise UserError(
                f"generation: position_embedding_type={model.position_embedding_type!r} with "
                f"apply_rope_fusion={model.config.apply_rope_fusion}: rows of a batch stand at places "
                f"of their own, which only {', '.join(_POSITIONS)} without fusion can; build the model "
                "so, or generate without a cache (cached=False)."
            )
        for layer in model.decoder.layers:
            core = layer.self_attention.core_attention
            wrapper = core if isinstance(core, KvCacheAttention) else None
            core = core if wrapper is None else wrapper.attention
            if not isinstance(core, SdpaAttention):
                raise UserError(
                    f"generation: {type(core).__name__} keeps no keys and values; build the model with "
                    "mqat.specs.backend.SdpaAttention (model.transformer_engine=false), or generate "
                    "without a cache (cached=False)."
                )
            found.append((core, wrapper))
    return found


@contextmanager
def _caches(models: Sequence[Any], rows: Rows) -> Iterator[list[LayerCache]]:
    """Inside, attention looks at what it kept, and rows have positions of their own."""
    attentions, caches = _attentions(models), []
    rotary = [(m, m.rotary_pos_emb) for m in models if m.position_embedding_type == "rope"]
    try:
        for core, wrapper in attentions:
            own = {} if wrapper is None else wrapper.quantizers
            key, value = own.get("key", own.get("kv")), own.get("value", own.get("kv"))
            core.cache = LayerCache(rows, key, value)
            caches.append(core.cache)
        for model, embedding in rotary:
            described = getattr(embedding, "model", None)
            short = None if described is None else switching_length(described)
            model.rotary_pos_emb = RowAngles(embedding, rows, model.max_sequence_length, short)
        yield caches
    finally:
        for core, _ in attentions:
            core.cache = None
        for model, embedding in rotary:
            model.rotary_pos_emb = embedding


class _Rows:
    """A batch of sequences, and the passes that continue them."""

    def __init__(self, chunks: Sequence[Any], rows: Rows, count: int, chosen: Chosen) -> None:
        self.chunks, self.rows, self.chosen = chunks, rows, chosen
        model = unwrapped(chunks)[0]
        self.multiple, self.longest = padding_multiple(chunks), int(model.max_sequence_length)
        described = getattr(getattr(model, "rotary_pos_emb", None), "model", None)
        self.short = None if described is None else switching_length(described)
        self.held: list[list[int]] = [[] for _ in range(count)]

    def __call__(self, new: Sequence[Sequence[int]]) -> Tensor:
        """One pass."""
        starts = [len(held) for held in self.held]
        for held, following in zip(self.held, new, strict=True):
            held += following
        if self._turns_otherwise(starts):
            starts, new = [0] * len(starts), self.held  # what was kept was rotated otherwise
        counts = [len(own) for own in new]
        width = max(*counts, 1)
        width += -width % self.multiple
        tokens = torch.tensor([[*own, *[0] * (width - len(own))] for own in new])
        self.rows.begin(starts, counts, width)
        places = torch.tensor(starts)[:, None] + torch.arange(width)
        last = (torch.tensor(counts) - 1).clamp(min=0)
        self.chosen.set(torch.arange(len(new)), last)
        local = chosen_logits(self.chunks, tokens, places.clamp(max=self.longest - 1), self.chosen)
        shape = len(new), true_vocab_size(self.chunks)
        logits = torch.empty(shape, device=device())
        if local is not None:
            logits.copy_(whole_vocabulary(self.chunks, local))
        return from_last_stage(logits).cpu()

    def _turns_otherwise(self, starts: Sequence[int]) -> bool:
        """Whether a row becomes so long in this pass that LongRoPE turns all its tokens otherwise."""
        short = self.short
        if short is None:
            return False
        return any(0 < a <= short < len(b) for a, b in zip(starts, self.held, strict=True))


@contextmanager
def continued(
    chunks: Sequence[Any], count: int, capacity: int
) -> Iterator[tuple[Continue, list[LayerCache]]]:
    """Passes that continue `count` sequences of up to `capacity` tokens each; and what keeps them.

    Ranks that share the model give the same tokens and get the same logits. Weights must not change
    inside: each is quantized once.

    Raises:
        UserError: The model's attention cannot keep keys and values, or its positions not differ by row.
    """
    multiple, chosen = padding_multiple(chunks), Chosen()
    rows = Rows(count, capacity + multiple)
    with looking_at(chunks, chosen):
        passes = _Rows(chunks, rows, count, chosen)
        with _caches(unwrapped(chunks), rows) as caches:
            yield passes, caches


@contextmanager
def recomputed(chunks: Sequence[Any], count: int) -> Iterator[Continue]:
    """As `continued` without keeping anything: every pass computes all tokens of a row anew, alone."""
    chosen, held = Chosen(), [list[int]() for _ in range(count)]
    multiple, logits = padding_multiple(chunks), torch.zeros(count, true_vocab_size(chunks))

    def passes(new: Sequence[Sequence[int]]) -> Tensor:
        for row, following in enumerate(new):
            if not following:
                continue
            held[row] += following
            last = len(held[row]) - 1
            chosen.set(torch.zeros(1, dtype=torch.int64), torch.tensor([last]))
            padded = [*held[row], *[0] * (-len(held[row]) % multiple)]
            places = torch.arange(len(padded))[None]
            local = chosen_logits(chunks, torch.tensor([padded]), places, chosen)
            found = torch.empty(1, logits.shape[1], device=device())
            if local is not None:
                found.copy_(whole_vocabulary(chunks, local))
            logits[row] = from_last_stage(found)[0].cpu()
        return logits.clone()

    with looking_at(chunks, chosen):
        yield passes


def keeps_past(chunks: Sequence[Any]) -> bool:
    """Whether `continued` takes this model."""
    try:
        _attentions(unwrapped(chunks))
    except UserError:
        return False
    return True

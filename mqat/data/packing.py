"""From documents to sequences of fixed length.

`S` is the sequence length: inputs are tokens[:, :-1], labels are tokens[:, 1:].
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mqat.data.chat import chat_template, tokenize_conversation
from mqat.data.documents import BadLines, Conversation, ReadStats
from mqat.errors import UserError


@dataclass(frozen=True)
class PackedDataset:
    """Sequences ready for training.

    Attributes:
        tokens: int32 [N, S + 1].
        loss_mask: bool [N, S], True where the label counts.
        segments: int32 [N, S], number of the conversation each input token belongs to, -1 for
            padding; None: plain causal attention over the whole sequence.
        stats: What was read and what was left out.
    """

    tokens: Tensor
    loss_mask: Tensor
    segments: Tensor | None
    stats: ReadStats = field(default_factory=ReadStats)

    def __len__(self) -> int:
        """Number of sequences."""
        return int(self.tokens.shape[0])

    @property
    def dropped_tokens(self) -> int:
        """Tokens that fit in no sequence."""
        return self.stats.dropped_tokens

    def subset(self, count: int | None) -> PackedDataset:
        """`count` sequences spread evenly over all of them; None: all."""
        if count is None or count >= len(self):
            return self
        rows = torch.arange(count) * len(self) // count
        segments = None if self.segments is None else self.segments[rows]
        return replace(
            self, tokens=self.tokens[rows], loss_mask=self.loss_mask[rows], segments=segments
        )


def document_ends(segments: Tensor) -> Tensor:
    """0 and where each document of a row ends, for attention within documents.

    The same as Megatron's `cu_seqlens`, for each row.

    Args:
        segments: [b, s], equal for neighbours of one document; padding is one, too.

    Returns:
        int32 [b, n + 1] for n documents at most; rows with fewer repeat their last end, s.
    """
    batch, length = segments.shape
    found = [
        [0, *((row[1:] != row[:-1]).nonzero().flatten() + 1).tolist(), length] for row in segments
    ]
    most = max((len(ends) for ends in found), default=0)
    padded = [ends + [length] * (most - len(ends)) for ends in found]
    return torch.tensor(padded, dtype=torch.int32).view(batch, most)


def positions_in_documents(segments: Tensor) -> Tensor:
    """Number of each token in its document, int64 [b, s]; arguments as for `document_ends`.

    Learned positions count them; rotary ones depend on distances only and ignore them.
    """
    position = torch.arange(segments.shape[1]).expand(segments.shape)
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return position - torch.where(begins, position, 0).cummax(dim=1).values


def _end_token(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no end token, which separates documents; set eos_token in its "
            "tokenizer_config.json."
        )
    return int(tokenizer.eos_token_id)


def join_documents(documents: Sequence[str], tokenizer: Any) -> tuple[array[int], list[int]]:
    """Ids of all of them, each begun as the tokenizer begins any text and closed by the end token.

    Returns:
        The ids, and where each document starts among them.

    Raises:
        UserError: The tokenizer has no end token.
    """
    end = _end_token(tokenizer)
    ids, starts = array("i"), []
    for document in documents:
        starts.append(len(ids))
        ids.extend(tokenizer(document, verbose=False)["input_ids"])
        if not ids or ids[-1] != end:
            ids.append(end)
    return ids, starts


def begin_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text: `<bos>` for Gemma, nothing for SmolLM2."""
    whole = tokenizer("a", verbose=False)["input_ids"]
    bare = tokenizer("a", verbose=False, add_special_tokens=False)["input_ids"]
    places = range(len(whole) - len(bare), 0, -1)
    return next((list(whole[:n]) for n in places if whole[n : n + len(bare)] == bare), [])


def _begin_windows_(tokens: Tensor, mask: Tensor, begin: list[int], starts: Sequence[int]) -> None:
    """Every window begins as a text does; labels that nothing before them predicts do not count.

    Args:
        tokens: [N, S + 1]; the first ones of each row are overwritten.
        mask: bool [N, S]; set to False at begin tokens, and at the first label of a window that begins
            inside a document.
        begin: `begin_tokens`.
        starts: Where documents start in the text that the windows are cut from.
    """
    count, length = mask.shape
    first = torch.tensor(starts)
    opens = torch.isin(torch.arange(count) * length, first)
    labels = mask.view(-1)
    for place in range(len(begin)):
        found = first + place - 1  # label i is token i + 1
        labels[found[(found >= 0) & (found < labels.numel())]] = False
    tokens[:, : len(begin)] = torch.tensor(begin, dtype=tokens.dtype)
    mask[:, : len(begin)] &= opens[:, None]


def pack_text(
    documents: Sequence[str], tokenizer: Any, seq_length: int, stats: ReadStats | None = None
) -> PackedDataset:
    """Documents joined by the end token and cut into windows; the last, short one is dropped.

    Where the tokenizer begins every text with a token, every window begins with it: it takes the place
    of the first token, which the window before has as its last label. Models that were trained so lean
    on it; llama.cpp's `perplexity` and `imatrix` do the same.

    Args:
        documents: Plain text.
        tokenizer: Transformers tokenizer.
        seq_length: S.
        stats: What reading counted; completed and kept in the result.

    Raises:
        ValueError: Not enough text for one window, or the tokenizer has no end token.
    """
    stats = stats if stats is not None else ReadStats(documents=len(documents))
    begin = begin_tokens(tokenizer)
    if seq_length <= len(begin):
        raise UserError(
            f"sequences of {seq_length} tokens hold no more than the {len(begin)} that the tokenizer "
            "begins a text with; lengthen them (--seq-length, model.data.seq_length)."
        )
    ids, starts = join_documents(documents, tokenizer)
    # Windows overlap by one token, so that every token is a label once.
    count = (len(ids) - 1) // seq_length
    if count <= 0:
        raise UserError(
            f"{len(documents)} documents have {len(ids)} tokens, fewer than one sequence of "
            f"{seq_length} + 1; add text or shorten the sequences (--seq-length, model.data.seq_length)."
        )
    used = count * seq_length + 1
    flat = torch.tensor(ids[:used], dtype=torch.int32)
    stats.dropped_tokens += len(ids) - used
    tokens = flat.unfold(0, seq_length + 1, seq_length).contiguous()
    mask = torch.ones(count, seq_length, dtype=torch.bool)
    if begin:
        _begin_windows_(tokens, mask, begin, starts)
    return PackedDataset(tokens, mask, None, stats)


def best_fit(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Indices of `sizes` grouped so that no group exceeds `room`; in order, fullest fit first.

    Args:
        sizes: Each at most `room`.
        room: Capacity of a group.
    """
    groups: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, group), sorted: a fit is found by bisection
    for index, size in enumerate(sizes):
        position = bisect_left(free, (size, -1))
        if position == len(free):
            left, group = room, len(groups)
            groups.append([])
        else:
            left, group = free.pop(position)
        groups[group].append(index)
        insort(free, (left - size, group))
    return groups


def _tokenized(
    conversations: Sequence[Conversation],
    tokenizer: Any,
    room: int,
    complaints: BadLines,
) -> list[tuple[list[int], list[bool]]]:
    """Ids and answer marks of what is kept, cut to `room`."""
    stats = complaints.stats
    examples = []
    for conversation in conversations:
        try:
            ids, answer = tokenize_conversation(
                conversation.messages, tokenizer, conversation.tools
            )
        except ValueError as error:
            complaints.report(conversation.place, error)
            continue
        # The first token of an example is never a label: nothing before it predicts it.
        if any(answer[1:room]):
            stats.cut_conversations += len(ids) > room
            stats.dropped_tokens += max(len(ids) - room, 0)
            examples.append((ids[:room], answer[:room]))
        else:
            stats.dropped_conversations += 1
            stats.dropped_tokens += len(ids)
    return examples


def pack_conversations(
    conversations: Sequence[Conversation],
    tokenizer: Any,
    seq_length: int,
    *,
    bad_lines: str = "error",
    stats: ReadStats | None = None,
) -> PackedDataset:
    """Whole conversations packed into sequences, each attending only to itself.

    A conversation longer than a sequence is cut at its end; one whose answers would be cut away
    entirely is left out. Both are counted.

    Args:
        conversations: What to pack.
        tokenizer: Transformers tokenizer; its chat template is used if it has one.
        seq_length: S.
        bad_lines: `error`, or `skip` conversations that the chat template refuses.
        stats: What reading counted; completed and kept in the result.

    Raises:
        ValueError: Nothing is left to learn from, or the template refuses a conversation.
    """
    stats = stats if stats is not None else ReadStats(documents=len(conversations))
    end = _end_token(tokenizer)
    chat_template(tokenizer)  # refuses a tokenizer before conversations are blamed for it
    room = seq_length + 1
    examples = _tokenized(conversations, tokenizer, room, BadLines(bad_lines, stats))
    if not examples:
        skipped = stats.skipped_lines
        raise UserError(
            f"none of {len(conversations)} conversations has an answer within {seq_length} "
            "tokens; lengthen the sequences (seq_length)."
            + (f" ({len(skipped)} skipped, the first: {skipped[0]})" if skipped else "")
        )
    rows = best_fit([len(ids) for ids, _ in examples], room)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
    tokens = torch.full((len(rows), room), pad, dtype=torch.int32)
    counts = torch.zeros(len(rows), room, dtype=torch.bool)
    segments = torch.full((len(rows), room), -1, dtype=torch.int32)
    for row, members in enumerate(rows):
        start = 0
        for number, member in enumerate(members):
            ids, answer = examples[member]
            stop = start + len(ids)
            tokens[row, start:stop] = torch.tensor(ids, dtype=torch.int32)
            counts[row, start:stop] = torch.tensor(answer)
            counts[row, start] = False  # its predecessor belongs to another conversation
            segments[row, start:stop] = number
            start = stop
    return PackedDataset(tokens, counts[:, 1:].contiguous(), segments[:, :-1].contiguous(), stats)

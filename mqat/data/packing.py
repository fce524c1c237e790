"""From documents to sequences of fixed length.

`S` is the sequence length: inputs are tokens[:, :-1], labels are tokens[:, 1:].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mqat.data.documents import Message


@dataclass(frozen=True)
class PackedDataset:
    """Sequences ready for training.

    Attributes:
        tokens: int32 [N, S + 1].
        loss_mask: bool [N, S], True where the label counts.
        segments: int32 [N, S], number of the conversation each input token belongs to, -1 for
            padding; None: plain causal attention over the whole sequence.
        dropped_tokens: Tokens that did not fit.
    """

    tokens: Tensor
    loss_mask: Tensor
    segments: Tensor | None
    dropped_tokens: int

    def __len__(self) -> int:
        """Number of sequences."""
        return int(self.tokens.shape[0])

    def subset(self, count: int | None) -> PackedDataset:
        """`count` sequences spread evenly over all of them; None: all."""
        if count is None or count >= len(self):
            return self
        rows = torch.arange(count) * len(self) // count
        segments = None if self.segments is None else self.segments[rows]
        return PackedDataset(self.tokens[rows], self.loss_mask[rows], segments, self.dropped_tokens)


def pack_text(documents: Sequence[str], tokenizer: Any, seq_length: int) -> PackedDataset:
    """Documents joined by the end token and cut into windows; the last, short one is dropped.

    Raises:
        ValueError: Not enough text for one window.
    """
    ids: list[int] = []
    for document in documents:
        ids += tokenizer(document, add_special_tokens=False)["input_ids"]
        ids.append(tokenizer.eos_token_id)
    # Windows overlap by one token, so that every token is a label once.
    count = (len(ids) - 1) // seq_length
    if count == 0:
        raise ValueError(
            f"{len(documents)} documents have {len(ids)} tokens, fewer than one sequence of "
            f"model.data.seq_length={seq_length} + 1; add text or shorten the sequences."
        )
    flat = torch.tensor(ids[: count * seq_length + 1], dtype=torch.int32)
    tokens = flat.unfold(0, seq_length + 1, seq_length).contiguous()
    mask = torch.ones(count, seq_length, dtype=torch.bool)
    return PackedDataset(tokens, mask, None, len(ids) - len(flat))


def tokenize_conversation(
    messages: Sequence[Message], tokenizer: Any
) -> tuple[list[int], list[bool]]:
    """Token ids, and which of them belong to an assistant's answer (its end token included).

    Answers are found by rendering the conversation up to before and after each of them, so any chat
    template works whose text for a prefix is a prefix of its text for the whole.

    Raises:
        ValueError: The template is not of that kind.
    """

    def render(upto: int, *, prompt: bool = False) -> str:
        if tokenizer.chat_template is None:
            return "".join(
                m["content"] + (tokenizer.eos_token if m["role"] == "assistant" else "\n")
                for m in messages[:upto]
            )
        return str(
            tokenizer.apply_chat_template(
                list(messages[:upto]), tokenize=False, add_generation_prompt=prompt
            )
        )

    whole = render(len(messages))
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(index, prompt=True), render(index + 1)
        if not (whole.startswith(after) and after.startswith(before)):
            raise ValueError(
                "the tokenizer's chat template rewrites earlier messages, so answers cannot be told "
                "from questions; set a template that only appends."
            )
        spans.append((len(before), len(after.rstrip("\n"))))
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    answer = [
        any(start < stop_ and stop > start_ for start_, stop_ in spans)
        for start, stop in encoded["offset_mapping"]
    ]
    return encoded["input_ids"], answer


def pack_conversations(
    conversations: Sequence[Sequence[Message]], tokenizer: Any, seq_length: int
) -> PackedDataset:
    """Whole conversations packed first-fit into sequences, each attending only to itself.

    A conversation longer than a sequence is cut at its end; one whose answers would be cut away
    entirely is left out. Both are counted in `dropped_tokens`.

    Raises:
        ValueError: Nothing is left to learn from.
    """
    room = seq_length + 1
    dropped = 0
    bins: list[list[tuple[list[int], list[bool]]]] = []
    free: list[int] = []
    for messages in conversations:
        ids, answer = tokenize_conversation(messages, tokenizer)
        dropped += max(len(ids) - room, 0)
        ids, answer = ids[:room], answer[:room]
        if not any(answer):
            dropped += len(ids)
            continue
        place = next((i for i, left in enumerate(free) if left >= len(ids)), None)
        if place is None:
            place = len(bins)
            bins.append([])
            free.append(room)
        bins[place].append((ids, answer))
        free[place] -= len(ids)
    if not bins:
        raise ValueError(
            f"none of {len(conversations)} conversations has an answer within "
            f"model.data.seq_length={seq_length} tokens; lengthen the sequences."
        )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    tokens = torch.full((len(bins), room), pad, dtype=torch.int32)
    counts = torch.zeros(len(bins), room, dtype=torch.bool)
    segments = torch.full((len(bins), room), -1, dtype=torch.int32)
    for row, content in enumerate(bins):
        start = 0
        for number, (ids, answer) in enumerate(content):
            stop = start + len(ids)
            tokens[row, start:stop] = torch.tensor(ids, dtype=torch.int32)
            counts[row, start:stop] = torch.tensor(answer)
            counts[row, start] = False  # its predecessor belongs to another conversation
            segments[row, start:stop] = number
            start = stop
    return PackedDataset(tokens, counts[:, 1:].contiguous(), segments[:, :-1].contiguous(), dropped)

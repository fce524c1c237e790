"""Prompts continued by a model: batches of any lengths, greedy or sampled, until they end."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mqat.data.chat import chat_template
from mqat.errors import UserError
from mqat.evaluation.sampling import Sampling
from mqat.evaluation.text_model import TextModel
from mqat.runtime import groups

GREEDY = Sampling()
# Why a text ends.
END_TOKEN, STOP, MAX_TOKENS, LONGEST = "end token", "stop", "max_tokens", "max_position_embeddings"


@dataclass(frozen=True)
class Generated:
    """What came after one prompt.

    Attributes:
        text: Without the prompt, special tokens, and the stop string with what follows it.
        tokens: All that were generated, an end token included.
        prompt_tokens: How many the prompt has.
        ended_by: `END_TOKEN`, `STOP`, `MAX_TOKENS` or `LONGEST`.
        stop: The stop string that came.
    """

    text: str
    tokens: list[int]
    prompt_tokens: int
    ended_by: str
    stop: str | None = None


@dataclass
class Speed:
    """Tokens and seconds: of prompts, whose tokens are computed at once, and of those that follow.

    The first token of an answer belongs to the prompt's pass.
    """

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0

    def __str__(self) -> str:
        parts = [
            f"prompts: {self.prompt_tokens} tokens, {_rate(self.prompt_tokens, self.prompt_seconds)}"
        ]
        if self.decode_tokens:
            rate = _rate(self.decode_tokens, self.decode_seconds)
            parts.append(f"decoding: {self.decode_tokens} tokens, {rate}")
        return "; ".join(parts)


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens / max(seconds, 1e-9):.1f} tokens/s"


@dataclass(frozen=True)
class Limits:
    """When a text ends, besides at an end token.

    Attributes:
        max_tokens: At most so many are generated.
        stop: Strings that end a text.
        ignores_end: End tokens do not.
    """

    max_tokens: int
    stop: tuple[str, ...] = ()
    ignores_end: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UserError(f"max_tokens={self.max_tokens} must be at least 1.")
        if "" in self.stop:
            raise UserError("stop: an empty string comes at once; leave it out.")


@dataclass
class _Row:
    """A prompt in work."""

    number: int
    prompt: list[int]
    generator: torch.Generator
    tokens: list[int] = field(default_factory=list)
    done: Generated | None = None

    def take(self, token: int, model: TextModel, limits: Limits) -> None:
        """The next token; the row may end with it."""
        self.tokens.append(token)
        text = model.tokenizer.decode(self.tokens, skip_special_tokens=True)
        found = [(text.index(stop), stop) for stop in limits.stop if stop in text]
        # The text has no special tokens, one of which may be what is to end it.
        written = model.tokenizer.decode([token], skip_special_tokens=False)
        if not found and written in limits.stop:
            found = [(len(text), written)]
        ended_by, stop = None, None
        if found:
            at, stop = min(found)
            text, ended_by = text[:at], STOP
        elif token in model.ends and not limits.ignores_end:
            ended_by = END_TOKEN
        elif len(self.prompt) + len(self.tokens) >= model.longest:
            ended_by = LONGEST
        elif len(self.tokens) >= limits.max_tokens:
            ended_by = MAX_TOKENS
        if ended_by is not None:
            self.done = Generated(text, self.tokens, len(self.prompt), ended_by, stop)


def _check(prompts: Sequence[Sequence[int]], longest: int) -> None:
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise UserError(f"prompt {number} is empty; give at least one word to continue.")
        if len(prompt) >= longest:
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens, and the model takes sequences of "
                f"max_position_embeddings={longest}: nothing can follow; shorten it."
            )


def _continue_batch(
    model: TextModel, rows: list[_Row], sampling: Sampling, limits: Limits, speed: Speed, *,
    cached: bool,
) -> None:  # fmt: skip
    """Until all rows are done."""
    capacity = min(max(len(row.prompt) for row in rows) + limits.max_tokens, model.longest)
    with model.continued(len(rows), capacity, cached=cached) as passes:
        new = [row.prompt for row in rows]
        while any(new):
            began = time.perf_counter()
            logits = passes(new)
            seconds, count = time.perf_counter() - began, sum(map(len, new))
            if rows[0].tokens:
                speed.decode_seconds += seconds
                speed.decode_tokens += count
            else:
                speed.prompt_seconds += seconds
                speed.prompt_tokens += count
            for row, scores in zip(rows, logits, strict=True):
                if row.done is None:
                    row.take(sampling.choose(scores, row.generator), model, limits)
            new = [row.tokens[-1:] if row.done is None else [] for row in rows]


def generate(
    model: TextModel,
    prompts: Sequence[Sequence[int]],
    limits: Limits,
    *,
    sampling: Sampling = GREEDY,
    batch_size: int = 8,
    cached: bool = True,
) -> tuple[list[Generated], Speed]:
    """What follows each prompt, in their order, and how fast; the same on every rank.

    Args:
        model: All ranks call.
        prompts: Tokens of each; the same on every rank.
        limits: When they end.
        sampling: How tokens are chosen.
        batch_size: Prompts continued at once; their lengths may differ.
        cached: Keep keys and values; otherwise each token computes all before it again (a control).

    Raises:
        UserError: A prompt is empty or too long; on every rank.
    """
    _check(prompts, model.longest)
    # Prompts of like lengths go together, so that little is padded.
    order = sorted(range(len(prompts)), key=lambda n: -len(prompts[n]))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    rank, copies = model.share
    found, speed = dict[int, Generated](), Speed()
    for numbers in batches[rank::copies]:
        rows = [_Row(n, list(prompts[n]), sampling.generator(n)) for n in numbers]
        _continue_batch(model, rows, sampling, limits, speed, cached=cached)
        found |= {row.number: row.done for row in rows if row.done is not None}
    everywhere: dict[int, Generated] = {}
    speeds: dict[int, Speed] = {}
    for copy, own, took in groups.gathered((rank, found, speed)):
        everywhere |= own
        speeds[copy] = took
    return [everywhere[n] for n in range(len(prompts))], _together(list(speeds.values()))


def _together(speeds: Sequence[Speed]) -> Speed:
    """Of copies of a model that work at the same time."""
    return Speed(
        sum(s.prompt_tokens for s in speeds), max(s.prompt_seconds for s in speeds),
        sum(s.decode_tokens for s in speeds), max(s.decode_seconds for s in speeds),
    )  # fmt: skip


def prompt_tokens(
    tokenizer: Any, text: str, *, chat: bool = False, system: str | None = None
) -> list[int]:
    """Tokens of a prompt: of a text as the tokenizer begins any, or as the user's turn of a chat.

    Raises:
        UserError: `chat`, and the tokenizer has no chat template; `system` without `chat`.
    """
    if not chat:
        if system is not None:
            raise UserError("a system message is part of a chat; ask for one, too (--chat).")
        return list(tokenizer(text)["input_ids"])
    template = chat_template(tokenizer)
    if template is None:
        raise UserError(
            "the tokenizer has no chat template; set chat_template in its tokenizer_config.json, or "
            "give the prompt as plain text."
        )
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": text})
    written = tokenizer.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=True, tokenize=False
    )
    return list(tokenizer(written, add_special_tokens=False)["input_ids"])

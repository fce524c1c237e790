"""How likely a model finds texts: the one implementation behind perplexities and evaluation tasks."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from mqat.evaluation.text_model import TextModel
from mqat.runtime import groups


@dataclass(frozen=True)
class Request:
    """How likely is `continuation` behind `context`? Neither is empty."""

    context: Sequence[int]
    continuation: Sequence[int]


@dataclass(frozen=True)
class Score:
    """Of one request.

    Attributes:
        total: Natural logarithm of the continuation's probability.
        is_greedy: Each of its tokens is the likeliest one.
    """

    total: float
    is_greedy: bool


def windows(
    tokens: Sequence[int], longest: int, stride: int, *, first: int = 1
) -> Iterator[Request]:
    """Requests that ask for every token of a text once, from `first` on.

    Each has at most `longest` tokens as input, its continuation's last one not among them. After the
    first window `stride` tokens are asked for at a time (fewer at the end), in full windows.
    """
    at = first
    while at < len(tokens):
        end = min(at + (longest if at == first else stride), len(tokens))
        # The last token of a context is the first one's input.
        begin = max(end - 1 - longest, 0)
        yield Request(tokens[begin:at], tokens[at:end])
        at = end


def score(model: TextModel, requests: Sequence[Request], *, batch_size: int = 8) -> list[Score]:
    """Of each request, in their order, on every rank; all ranks call with the same ones.

    Requests that differ in their last token only (answers of a letter) share a pass.
    """
    inputs = {_input(request): None for request in requests}
    order = sorted(inputs, key=lambda tokens: (-len(tokens), tokens))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    wanted: dict[tuple[int, ...], list[Request]] = {tokens: [] for tokens in order}
    for request in requests:
        wanted[_input(request)].append(request)
    rank, copies = model.share
    own: dict[tuple[tuple[int, ...], tuple[int, ...]], Score] = {}
    for batch in batches[rank::copies]:
        own |= _score_batch(model, batch, wanted)
    found = {key: score for scores in groups.gathered(own) for key, score in scores.items()}
    return [found[_input(request), tuple(request.continuation)] for request in requests]


def _input(request: Request) -> tuple[int, ...]:
    return *request.context, *request.continuation[:-1]


def _score_batch(
    model: TextModel,
    batch: Sequence[tuple[int, ...]],
    wanted: Mapping[tuple[int, ...], list[Request]],
) -> dict[tuple[tuple[int, ...], tuple[int, ...]], Score]:
    width = max(map(len, batch))
    tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in batch])
    # Of each row the last tokens that any of its requests asks for.
    counts = [max(len(request.continuation) for request in wanted[row]) for row in batch]
    most = max(len(wanted[row]) for row in batch)
    rows, places = list[int](), list[int]()
    targets = list[tuple[int, ...]]()
    for number, (row, count) in enumerate(zip(batch, counts, strict=True)):
        answers = [_aligned(request.continuation, count) for request in wanted[row]]
        answers += answers[:1] * (most - len(answers))
        rows += [number] * count
        places += range(len(row) - count, len(row))
        targets += list(zip(*answers, strict=True))
    logs, best = model.score(tokens, *map(torch.tensor, (rows, places, targets)))
    found, at = {}, 0
    for row, count in zip(batch, counts, strict=True):
        for column, request in enumerate(wanted[row]):
            last = slice(at + count - len(request.continuation), at + count)
            is_greedy = best[last].tolist() == list(request.continuation)
            total = float(logs[last, column].double().sum())
            found[row, tuple(request.continuation)] = Score(total, is_greedy)
        at += count
    return found


def _aligned(continuation: Sequence[int], count: int) -> list[int]:
    """With filler in front: the last tokens of all are asked for behind the same places."""
    return [0] * (count - len(continuation)) + list(continuation)


def total_loss(scores: Sequence[Score]) -> float:
    """Negative logarithms of all, summed up in their order."""
    return -sum(score.total for score in scores)

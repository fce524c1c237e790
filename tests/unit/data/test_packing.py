from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mqat.data.chat import tokenize_conversation
from mqat.data.documents import Conversation
from mqat.data.packing import best_fit, pack_conversations, pack_text, positions_in_documents


def conversation(question: str, answer: str, place: str = "file:1") -> Conversation:
    messages = (
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    )
    return Conversation(messages, place)


def test_every_token_of_the_joined_documents_is_a_label_once(tokenizer: Any) -> None:
    documents = ["The for statement.", "A class is a template. " * 9]
    joined: list[int] = []
    for document in documents:
        joined += [*tokenizer(document)["input_ids"], tokenizer.eos_token_id]
    packed = pack_text(documents, tokenizer, 16)
    assert packed.tokens.dtype == torch.int32
    assert packed.tokens.shape[1] == 17
    labels = packed.tokens[:, 1:].flatten().tolist()
    assert [packed.tokens[0, 0].item(), *labels] == joined[: len(labels) + 1]
    assert packed.dropped_tokens == len(joined) - 1 - len(labels)
    assert 0 <= packed.dropped_tokens < 16
    assert packed.loss_mask.all()
    assert packed.segments is None


def beginning_with(tokenizer: Any, begin: str, end: str = "") -> Any:
    """The tokenizer, of which every text begins with the letters of `begin`, and ends with `end`."""
    from tokenizers.processors import TemplateProcessing

    vocabulary = tokenizer.get_vocab()
    found = type(tokenizer)(
        tokenizer_object=deepcopy(tokenizer.backend_tokenizer), eos_token=tokenizer.eos_token
    )
    words = [*begin, "$A", *([end] if end else [])]
    found.backend_tokenizer.post_processor = TemplateProcessing(
        single=" ".join(words),
        special_tokens=[(word, vocabulary[word]) for word in {*words} - {"$A"}],
    )
    return found


@pytest.mark.parametrize("end", ["", "<|endoftext|>"])
@pytest.mark.parametrize("begin", ["a", "ab"])
def test_every_window_begins_as_the_tokenizer_begins_a_text(
    tokenizer: Any, begin: str, end: str
) -> None:
    documents = ["The for statement.", "A class is a template. " * 9, "Names refer to objects."]
    with_begin, size = beginning_with(tokenizer, begin, end), 8
    first = [tokenizer.get_vocab()[letter] for letter in begin]
    joined: list[int] = []
    counts: list[bool] = []
    for document in documents:
        text = [*tokenizer(document)["input_ids"], tokenizer.eos_token_id]
        joined += first + text
        counts += [False] * len(first) + [True] * len(text)
    starts = [0, *(i + 1 for i, token in enumerate(joined) if token == tokenizer.eos_token_id)]
    packed = pack_text(documents, with_begin, size)
    assert packed.tokens[:, : len(first)].eq(torch.tensor(first)).all()
    n = len(first)
    for number, (row, mask) in enumerate(zip(packed.tokens, packed.loss_mask, strict=True)):
        at = number * size
        assert row[n:].tolist() == joined[at + n : at + size + 1]
        wanted = counts[at + 1 : at + size + 1]
        if at not in starts:  # nothing before its first tokens predicts them
            wanted[:n] = [False] * n
        assert mask.tolist() == wanted
    plain = pack_text(documents, tokenizer, size)  # control: nothing is added, nothing changes
    assert plain.loss_mask.all() and not plain.tokens[:, 0].eq(first[0]).all()


def test_a_document_that_begins_a_window_keeps_its_first_label(tokenizer: Any) -> None:
    text = "The for statement."
    size = len(tokenizer(text)["input_ids"]) + 2  # begin token, text, end token
    packed = pack_text([text] * 3, beginning_with(tokenizer, "a"), size)
    labels = packed.tokens[:, 1:][packed.loss_mask].tolist()
    assert labels == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id] * 2


def test_windows_of_begin_tokens_alone_are_an_error(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="sequences of 2 tokens hold no more than the 2 that"):
        pack_text(["The for statement."], beginning_with(tokenizer, "ab"), 2)


def test_text_shorter_than_a_window_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"1 documents have \d+ tokens.*of 512 \+ 1; add text"):
        pack_text(["short"], tokenizer, 512)
    with pytest.raises(ValueError, match="0 documents have 0 tokens"):
        pack_text([], tokenizer, 512)


def test_a_tokenizer_without_an_end_token_is_an_error(tokenizer: Any) -> None:
    endless = deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(ValueError, match=r"no end token.*tokenizer_config\.json"):
        pack_text(["text"], endless, 4)


def test_conversations_are_packed_whole_and_kept_apart(tokenizer: Any) -> None:
    sizes = [3, 9, 1, 14, 5, 2, 2, 7]
    examples = [conversation("question " * n, "answer " * n, f"file:{n}") for n in sizes]
    packed = pack_conversations(examples, tokenizer, 160)
    assert packed.segments is not None
    assert packed.dropped_tokens == 0
    assert len(packed) < len(examples)
    found = []
    for row in range(len(packed)):
        # The last token is only a label, so it has no segment of its own.
        segments = [*packed.segments[row].tolist(), None]
        for number in range(max(packed.segments[row].tolist()) + 1):
            places = [i for i, segment in enumerate(segments) if segment == number]
            assert places == list(range(places[0], places[-1] + 1))
            found.append(packed.tokens[row, places].tolist())
    whole = [tokenize_conversation(e.messages, tokenizer)[0] for e in examples]
    matched = [any(w[: len(f)] == f and len(w) - len(f) <= 1 for w in whole) for f in found]
    assert len(found) == len(whole) and all(matched)


def test_loss_counts_exactly_the_answers_wherever_they_are_packed(tokenizer: Any) -> None:
    examples = [conversation("q " * n, f"answer {n}") for n in range(1, 9)]
    packed = pack_conversations(examples, tokenizer, 64)
    counted = packed.tokens[:, 1:][packed.loss_mask]
    expected = sum(sum(tokenize_conversation(e.messages, tokenizer)[1]) for e in examples)
    assert len(counted) == expected
    text = tokenizer.decode(counted)
    assert sorted(text.split(tokenizer.eos_token)) == ["", *(f"answer {n}" for n in range(1, 9))]


def test_no_label_belongs_to_another_conversation_than_its_input(tokenizer: Any) -> None:
    starts_with_answer = Conversation(({"role": "assistant", "content": "abc"},), "file:1")
    plain = deepcopy(tokenizer)
    plain.chat_template = None  # so that the very first token is an answer
    packed = pack_conversations([starts_with_answer] * 3, plain, 32)
    assert packed.segments is not None
    same = packed.segments[:, :-1] == packed.segments[:, 1:]
    assert (same | ~packed.loss_mask[:, :-1]).all()
    each = len(tokenize_conversation(starts_with_answer.messages, plain)[0]) - 1
    assert packed.loss_mask.sum() == 3 * each


def test_an_answer_that_is_only_the_first_token_cannot_be_learned(tokenizer: Any) -> None:
    plain = deepcopy(tokenizer)
    plain.chat_template = "{{ messages[0].content }}{{ messages[1].content if messages[1] }}"
    one_token = Conversation(({"role": "assistant", "content": "a"},), "file:1")
    packed = pack_conversations([one_token, conversation("q", "a")], plain, 16)
    assert packed.stats.dropped_conversations == 1
    assert packed.loss_mask.sum() == 1  # the "a" behind "q"


def test_long_conversations_are_cut_or_dropped_and_counted(tokenizer: Any) -> None:
    cut = conversation("q", "word " * 200)
    hopeless = conversation("word " * 200, "a")
    packed = pack_conversations([cut, hopeless], tokenizer, 32)
    lengths = [len(tokenize_conversation(c.messages, tokenizer)[0]) for c in (cut, hopeless)]
    assert packed.stats.cut_conversations == 1
    assert packed.stats.dropped_conversations == 1
    assert packed.dropped_tokens == lengths[0] - 33 + lengths[1]
    with pytest.raises(ValueError, match=r"none of 1 conversations.*within 32 tokens"):
        pack_conversations([hopeless], tokenizer, 32)


def test_a_conversation_the_template_refuses_names_its_line(tokenizer: Any) -> None:
    strict = deepcopy(tokenizer)
    strict.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + tokenizer.chat_template
    )
    good = conversation("q", "a")
    bad = Conversation(({"role": "system", "content": "x"}, *good.messages), "data.jsonl:7")
    with pytest.raises(ValueError, match=r"data\.jsonl:7: .*no system"):
        pack_conversations([good, bad], strict, 32)
    packed = pack_conversations([good, bad], strict, 32, bad_lines="skip")
    assert packed.stats.skipped_lines[0].startswith("data.jsonl:7: ")
    with pytest.raises(ValueError, match=r"1 skipped, the first: data\.jsonl:7: "):
        pack_conversations([bad], strict, 32, bad_lines="skip")


def test_a_subset_is_spread_over_all_sequences(tokenizer: Any) -> None:
    packed = pack_text(["word " * 400], tokenizer, 16)
    chosen = packed.subset(4)
    assert torch.equal(chosen.tokens, packed.tokens[torch.arange(4) * len(packed) // 4])
    assert packed.subset(None) is packed


@given(sizes=st.lists(st.integers(1, 20), max_size=40))
def test_best_fit_places_everything_once_and_overfills_nothing(sizes: list[int]) -> None:
    groups = best_fit(sizes, 20)
    assert sorted(i for group in groups for i in group) == list(range(len(sizes)))
    loads = [sum(sizes[i] for i in group) for group in groups]
    assert all(load <= 20 for load in loads)
    # No two groups could be one: the second would not have been opened.
    assert all(a + b > 20 for n, a in enumerate(loads) for b in loads[:n])


def test_positions_begin_again_in_every_document() -> None:
    segments = torch.tensor([[0, 0, 0, 1, 1, -1], [4, 5, 5, 5, 5, 5]])
    wanted = [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]]
    assert positions_in_documents(segments).tolist() == wanted

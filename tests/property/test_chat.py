"""For any conversation and well-known template, labels are the assistant's words and its end token."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mqat.data.chat import tokenize_conversation
from tests.property.chat_templates import SPECIAL, TEMPLATES, as_it_is, trimmed

PIECES = [
    "Hello", "user", "assistant", "system", "là 日本", "🙂", "don't", "1871", "...", "{{ x }}",
    "<think>", "</think>", " ", "\n", "\n\n", "\t", "<|im_end|>", "</s>", "[INST]", "Assistant:",
    "\U000f0000", "<b>", '"', "\\",
]  # fmt: skip
TEXT = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=5).map("".join)
WORDS = TEXT.filter(lambda text: text.strip() and not {"\U0010fffe", "\U0010ffff"} & set(text))


@pytest.fixture(scope="module")
def byte_tokenizer() -> Any:
    """A token a byte, so that a label that is one character off is seen."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@st.composite
def conversations(draw: Any) -> list[dict[str, Any]]:
    messages = [{"role": "system", "content": draw(WORDS)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(WORDS)})
        weight = draw(st.sampled_from([{}, {}, {"weight": 0}, {"train": True}]))
        messages.append({"role": "assistant", "content": draw(WORDS), **weight})
    return messages


def say(*contents: str) -> list[dict[str, Any]]:
    roles = ("user", "assistant") * len(contents)
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=40, deadline=None)
@given(messages=conversations())
@example(messages=say("Hello", "<think>\nso\n</think>\n\nyes"))
@example(messages=say("Hello", "<think>so</think>yes", "and", " no\n"))
@example(messages=say("a", "user", "b", "user", "c", "..."))
def test_labels_are_the_assistants_words_and_its_end(
    name: str, messages: list[dict[str, Any]], byte_tokenizer: Any
) -> None:
    template = TEMPLATES[name]
    byte_tokenizer.chat_template = template.source
    if not template.has_system and messages[0]["role"] == "system":
        messages = messages[1:]
    shown, lost = [], False
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and message.get("weight", 1):
            words = template.words(message["content"], index + 1 == len(messages))
            lost |= words.split() != message["content"].split()
            shown.append(words + template.end)
    if not shown:
        return
    try:
        ids, answer = tokenize_conversation(messages, byte_tokenizer)
    except ValueError as error:
        assert "</think>" in "".join(m["content"] for m in messages), error
        assert template.words not in (as_it_is, trimmed), error
        return
    assert not lost
    plain = [{"role": m["role"], "content": m["content"]} for m in messages]
    same = byte_tokenizer.apply_chat_template(
        plain, return_dict=True, return_assistant_tokens_mask=template.has_marks
    )
    assert ids == same["input_ids"]
    labels = byte_tokenizer.decode([i for i, counts in zip(ids, answer, strict=True) if counts])
    if "</think>" in labels and name == "qwen3":  # sets its own line ends around thoughts
        assert "".join(labels.split()) == "".join("".join(shown).split())
    else:
        assert labels == "".join(shown)
    if template.has_marks and len(shown) == len(plain) // 2:
        # One-token answers at the very beginning apart (test_chat.py), transformers says the same.
        assert answer == [bool(flag) for flag in same["assistant_masks"]]

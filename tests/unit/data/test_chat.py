from __future__ import annotations

from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest

from mqat.data.chat import tokenize_conversation
from mqat.data.packing import pack_conversations

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Où est-ce ?"},
    {"role": "assistant", "content": " là 日本 \n\nthere"},
    {"role": "user", "content": "là"},
    {"role": "assistant", "content": "yes"},
]


def answers(tokenizer: Any, messages: list[dict[str, str]]) -> list[str]:
    """Text of each uninterrupted run of answer tokens."""
    ids, answer = tokenize_conversation(messages, tokenizer)
    assert len(ids) == len(answer)
    runs: list[list[int]] = []
    for index, token in enumerate(ids):
        if answer[index]:
            if index == 0 or not answer[index - 1]:
                runs.append([])
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


def with_template(tokenizer: Any, template: str | None) -> Any:
    changed = deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def test_the_loss_is_on_answers_and_their_end_tokens_only(tokenizer: Any) -> None:
    end = tokenizer.eos_token
    assert answers(tokenizer, TURNS) == [f" là 日本 \n\nthere{end}", f"yes{end}"]


def test_a_real_chat_template_gives_the_same(smollm2_tokenizer: Any) -> None:
    assert answers(smollm2_tokenizer, TURNS) == [" là 日本 \n\nthere<|im_end|>", "yes<|im_end|>"]
    ids, _ = tokenize_conversation(TURNS, smollm2_tokenizer)
    rendered = smollm2_tokenizer.apply_chat_template(TURNS, tokenize=True, return_dict=True)
    assert ids == rendered["input_ids"]


def test_without_a_template_messages_follow_each_other(tokenizer: Any) -> None:
    plain = with_template(tokenizer, None)
    end = plain.eos_token
    assert answers(plain, TURNS) == [f" là 日本 \n\nthere{end}", f"yes{end}"]
    ids, _ = tokenize_conversation(TURNS[:3], plain)
    assert plain.decode(ids) == f"Be brief.\nOù est-ce ?\n là 日本 \n\nthere{end}"


def test_a_template_with_generation_marks_is_believed(tokenizer: Any) -> None:
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}A:{% generation %}"
        "{{ m['content'] }}{{ eos_token }}{% endgeneration %}{% else %}Q:{{ m['content'] }}"
        "{% endif %}{% endfor %}"
    )
    marked = with_template(tokenizer, template)
    end = marked.eos_token
    assert answers(marked, TURNS) == [f" là 日本 \n\nthere{end}", f"yes{end}"]


def test_a_template_that_rewrites_history_is_refused(tokenizer: Any) -> None:
    last_only = with_template(
        tokenizer, "{{ messages|length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"rewrites earlier messages.*only appends"):
        tokenize_conversation(TURNS, last_only)


@pytest.mark.parametrize("mark", ["", "{% generation %}x{% endgeneration %}"])
def test_a_refusal_by_the_template_is_a_value_error(tokenizer: Any, mark: str) -> None:
    strict = with_template(tokenizer, mark + "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="template refuses it: roles must alternate"):
        tokenize_conversation(TURNS, strict)


def test_of_several_templates_the_default_one_is_used():
    from mqat.data.chat import chat_template

    several = SimpleNamespace(
        chat_template={"tool_use": "{{ tools }}", "default": "{{ messages }}"}
    )
    assert chat_template(several) == "{{ messages }}"
    several.chat_template = {"rag": "a", "tool_use": "b"}
    with pytest.raises(ValueError, match=r"chat templates \['rag', 'tool_use'\] and none called"):
        chat_template(several)


@pytest.mark.parametrize("bad_lines", ["error", "skip"])
def test_a_tokenizer_is_refused_before_its_conversations_are(
    tokenizer: Any, bad_lines: str
) -> None:
    several = deepcopy(tokenizer)
    several.chat_template = {"rag": "x", "tool_use": "y"}
    with pytest.raises(
        ValueError, match=r"^the tokenizer has the chat templates \['rag', 'tool_use'"
    ):
        pack_conversations([], several, 32, bad_lines=bad_lines)

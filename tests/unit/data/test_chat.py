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


def test_text_that_changes_with_the_conversation_is_no_label(tokenizer: Any) -> None:
    counted = with_template(
        tokenizer,
        "{{ messages|length }}{% for m in messages %}{{ m['content']|trim }}{{ eos_token }}{% endfor %}",
    )
    end = counted.eos_token
    assert answers(counted, TURNS) == [f"là 日本 \n\nthere{end}", f"yes{end}"]


def test_a_template_that_rewrites_answers_is_refused(tokenizer: Any) -> None:
    shouted = with_template(
        tokenizer, "{% for m in messages %}{{ m['content']|upper }}{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"treats messages by their words"):
        tokenize_conversation(TURNS, shouted)


THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>{% set c = m.content %}"
    "{% if '</think>' in c and not loop.last %}{% set c = c.split('</think>')[-1]|trim %}"
    "{% endif %}{{ c }}{{ eos_token }}{% endfor %}"
)


def test_words_that_a_template_leaves_out_are_counted_and_refused(tokenizer: Any) -> None:
    template = with_template(tokenizer, THINKING)
    thought = {"role": "assistant", "content": "<think>so it is</think>yes"}
    asked = {"role": "user", "content": "q"}
    assert answers(template, [asked, thought]) == [thought["content"] + template.eos_token]
    with pytest.raises(ValueError, match=r"leaves out 4 of 5 words of message 2 \(assistant"):
        tokenize_conversation([asked, thought, asked, thought], template)
    history = [asked, thought | {"weight": 0}, asked, thought]
    assert answers(template, history) == [thought["content"] + template.eos_token]
    no_system = with_template(
        tokenizer, "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"leaves out 2 of 2 words of message 1 \(system"):
        tokenize_conversation(TURNS, no_system)


WITH_CALLS = (
    "{% for t in tools or [] %}TOOL {{ t | tojson }}\n{% endfor %}{% for m in messages %}<{{ m.role }}>"
    "{{ m.content }}{% for c in m.tool_calls or [] %}CALL {{ c.function.name }}"
    "({{ c.function.arguments | tojson }}){% endfor %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at": "sky"}'}}
CALLING = [
    {"role": "user", "content": "weather?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "name": "look", "content": "rain"},
    {"role": "assistant", "content": "It rains."},
]


def test_tools_reach_the_template_and_calls_are_learnt(tokenizer: Any) -> None:
    calling = with_template(tokenizer, WITH_CALLS)
    ids, answer = tokenize_conversation(CALLING, calling, [TOOL])
    assert calling.decode(ids).startswith('TOOL {"type": "function", "function": {"name": "look"')
    labels = calling.decode([i for i, k in zip(ids, answer, strict=True) if k])
    end = calling.eos_token
    # The arguments arrive as the object that they are, as servers hand them to the template.
    assert labels == f'CALL look({{"at": "sky"}}){end}It rains.{end}'
    raw = with_template(tokenizer, WITH_CALLS.replace(" | tojson }})", " }})"))
    labels = "".join(answers(raw, CALLING))
    assert labels == f'CALL look({{"at": "sky"}}){end}It rains.{end}'


def test_tools_and_calls_that_a_template_drops_are_refused(tokenizer: Any) -> None:
    plain = with_template(tokenizer, "{% for m in messages %}{{ m.content }}\n{% endfor %}")
    with pytest.raises(ValueError, match=r"leaves out 2 of 2 words of message 2|leaves out 1 of 1"):
        tokenize_conversation(CALLING, plain)
    with pytest.raises(ValueError, match=r"does not show the tool 'look'"):
        tokenize_conversation(CALLING[:1] + CALLING[3:], plain, [TOOL])


@pytest.mark.parametrize("key", ["reasoning_content", "thinking"])
def test_reasoning_is_learnt_with_what_surrounds_it_or_refused(tokenizer: Any, key: str) -> None:
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "yes", key: "as so"},
    ]
    template = (
        "{% for m in messages %}<{{ m.role }}>{% if m.KEY %}<think>{{ m.KEY }}</think>{% endif %}"
        "{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    shown = with_template(tokenizer, template.replace("KEY", key))
    assert answers(shown, turns) == [f"<think>as so</think>yes{shown.eos_token}"]
    with pytest.raises(
        ValueError, match=rf"leaves out 2 of 2 words of message 2 \(assistant, '{key}'"
    ):
        tokenize_conversation(turns, with_template(tokenizer, template.replace("KEY", "thoughts")))


IN_A_MACRO = "{% macro say(m) %}BODY{% endmacro %}{% for m in messages %}{{ say(m) }}"


@pytest.mark.parametrize("place", [IN_A_MACRO, "{% for m in messages %}BODY"])
@pytest.mark.parametrize(
    "mark", ["{% generation %}", "{%- generation -%}", "{%generation%}", "{%+ generation %}"]
)
def test_marks_count_in_every_spelling_and_place(tokenizer: Any, mark: str, place: str) -> None:
    body = (
        "{% if m.role == 'assistant' %}A:MARK{{ m.content }}{{ eos_token }}{% endgeneration %}\n"
        "{% else %}{# {% generation %} #}Q:{{ m.content }}\n{% endif %}"
    )
    template = place.replace("BODY", body).replace("MARK", mark) + "{% endfor %}"
    marked = with_template(tokenizer, template)
    end = marked.eos_token
    assert answers(marked, TURNS) == [f" là 日本 \n\nthere{end}", f"yes{end}"]
    first_is_context = [*TURNS[:2], TURNS[2] | {"weight": 0}, *TURNS[3:]]
    assert answers(marked, first_is_context) == [f"yes{end}"]


def test_marks_that_cover_less_or_more_than_answers_are_refused(tokenizer: Any) -> None:
    around_all = (
        "{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration %}"
    )
    with pytest.raises(ValueError, match=r"marks cover more than answers \(message [12]\)"):
        tokenize_conversation(TURNS, with_template(tokenizer, around_all))
    last_only = (
        "{% for m in messages %}{% if loop.last %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"marks leave out words of message 3 \('là'\)"):
        tokenize_conversation(TURNS, with_template(tokenizer, last_only))


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

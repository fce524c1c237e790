"""Labels of chats with tools, beside transformers' own mask.

Each template is written twice: as models ship it, without marks, and with `{% generation %}` around what
the assistant writes, which `apply_chat_template(..., return_assistant_tokens_mask=True)` reads.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from mqat.data.chat import tokenize_conversation

LOOK = {"type": "function", "function": {
    "name": "look", "description": "Looks somewhere.",
    "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}}}  # fmt: skip
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How is the sky, and what is 1 + 2?"},
    {"role": "assistant", "content": "", "tool_calls": [call("look", at="sky"), call("add", a=1, b=2)]},
    {"role": "tool", "content": "rain"},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "It rains, and it is 3."},
    {"role": "user", "content": "And tomorrow?"},
    {"role": "assistant", "content": "Let me look.", "tool_calls": [call("look", at="sky tomorrow")]},
    {"role": "tool", "content": "rain"},  # as before: words of a tool are no answer
    {"role": "assistant", "content": "rain"},
]  # fmt: skip

# Qwen 2.5's form (Hermes' tags), with results in a user's turn.
QWEN = """\
{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}

{% endif %}# Tools
<tools>{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
</tools><|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}<|im_start|>user
{{ m.content }}<|im_end|>
{% elif m.role == 'assistant' %}<|im_start|>assistant
MARK{{ m.content }}{% for c in m.tool_calls or [] %}{% if m.content or not loop.first %}
{% endif %}<tool_call>
{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>END{{ '\n' }}
{%- elif m.role == 'tool' %}{% if loop.previtem.role != 'tool' %}<|im_start|>user{% endif %}
<tool_response>
{{ m.content }}
</tool_response>{% if loop.last or loop.nextitem.role != 'tool' %}<|im_end|>
{% endif %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# Llama 3.1's headers; results have a role of their own.
LLAMA = """\
{{- bos_token }}{% for m in messages %}
{%- if m.role == 'assistant' %}<|start_header_id|>assistant<|end_header_id|>

MARK{{ m.content | trim }}{% for c in m.tool_calls or [] %}{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}{% endfor %}<|eot_id|>END
{%- elif m.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>

{{ m.content | tojson }}<|eot_id|>
{%- else %}<|start_header_id|>{{ m.role }}<|end_header_id|>

{% if loop.first and tools %}{% for tool in tools %}{{ tool | tojson }}
{% endfor %}{% endif %}{{ m.content | trim }}<|eot_id|>
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""  # noqa: E501
TEMPLATES = {"qwen": QWEN, "llama": LLAMA}


def written(template: str, *, marked: bool) -> str:
    marks = ("{% generation %}", "{% endgeneration %}") if marked else ("", "")
    return template.replace("MARK", marks[0]).replace("END", marks[1])


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("length", [3, 6, 8, 10])
def test_labels_are_those_of_transformers_mask(tokenizer: Any, name: str, length: int) -> None:
    plain, marked = deepcopy(tokenizer), deepcopy(tokenizer)
    plain.chat_template = written(TEMPLATES[name], marked=False)
    marked.chat_template = written(TEMPLATES[name], marked=True)
    messages, tools = CHAT[:length], [LOOK, ADD]
    reference = marked.apply_chat_template(
        messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    mask = [bool(flag) for flag in reference["assistant_masks"]]
    assert any(mask) and not all(mask)
    for tokenizer_ in (plain, marked):
        ids, answer = tokenize_conversation(messages, tokenizer_, tools)
        assert ids == reference["input_ids"] and answer == mask
    # Control: with all answers but the last as context, the mask is another one.
    earlier = [m | {"weight": 0} if m["role"] == "assistant" else m for m in messages[:-1]]
    if len([m for m in messages if m["role"] == "assistant"]) > 1:
        _, last = tokenize_conversation([*earlier, messages[-1]], plain, tools)
        assert sum(last) < sum(mask) and all(a or not b for a, b in zip(mask, last, strict=True))

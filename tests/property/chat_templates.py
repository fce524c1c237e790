# ruff: noqa: E501
"""Chat templates that do what well-known models' templates do, written anew."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Words = Callable[
    [str, bool], str
]  # (answer, whether it is the last message) -> what is shown of it


def as_it_is(answer: str, is_last: bool) -> str:
    return answer


def trimmed(answer: str, is_last: bool) -> str:
    return answer.strip()


def without_thoughts(answer: str, is_last: bool) -> str:
    return answer.rsplit("</think>", 1)[-1]


def thoughts_in_last(answer: str, is_last: bool) -> str:
    if not is_last and "</think>" not in answer:
        return answer
    return (answer if is_last else without_thoughts(answer, is_last)).lstrip("\n")


@dataclass(frozen=True)
class Template:
    source: str
    end: str
    words: Words = as_it_is
    has_system: bool = True

    @property
    def has_marks(self) -> bool:
        return "endgeneration" in self.source


def turns(
    header: str, footer: str, *, prompt: str, content: str = "m.content", first: str = ""
) -> str:
    return (
        first + "{% for m in messages %}" + header + "{{ " + content + " }}" + footer + "{% endfor %}"
        "{% if add_generation_prompt %}" + prompt + "{% endif %}"
    )  # fmt: skip


CHATML = turns("<|im_start|>{{ m.role }}\n", "<|im_end|>\n", prompt="<|im_start|>assistant\n")
LLAMA3 = turns(
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n",
    "<|eot_id|>",
    content="m['content'] | trim",
    prompt="<|start_header_id|>assistant<|end_header_id|>\n\n",
    first="{{ bos_token }}",
)
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant."
    "<|im_end|>\n{% endif %}"
)
BRACKETS = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set said = messages[0].content %}"
    "{% set rest = messages[1:] %}{% else %}{% set said = none %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}"
)
QWEN3 = """\
{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
    {%- set said = m.content %}
    {%- set thought = '' %}
    {%- if '</think>' in said %}
        {%- set thought = said.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {%- set said = said.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {%- if loop.index0 > ns.last and (loop.last or thought) %}
        {{- '<|im_start|>assistant\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + said.lstrip('\\n') }}
    {%- else %}
        {{- '<|im_start|>assistant\\n' + said }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
BY_ROLE = (
    "{% for m in messages %}{% if m.role == 'system' %}SYSTEM{% elif m.role == 'user' %}USER"
    "{% else %}ANSWER{% endif %}{% endfor %}{% if add_generation_prompt %}PROMPT{% endif %}"
)


def by_role(system: str, user: str, answer: str, prompt: str) -> str:
    said = {"SYSTEM": system, "USER": user, "ANSWER": answer, "PROMPT": prompt}
    source = BY_ROLE
    for name, text in said.items():
        source = source.replace(name, text.replace("@", "{{ m.content }}"))
    return source


TEMPLATES = {
    "chatml": Template(CHATML, "<|im_end|>"),
    "smollm2": Template(DEFAULT_SYSTEM + CHATML, "<|im_end|>"),
    "qwen2.5": Template(DEFAULT_SYSTEM.replace("helpful", "careful") + CHATML, "<|im_end|>"),
    "qwen3": Template(QWEN3, "<|im_end|>", thoughts_in_last),
    "llama2": Template(
        BRACKETS + "{{ '[INST] ' + ('<<SYS>>\n' + said + '\n<</SYS>>\n\n' if loop.first and said else '') "
        "+ m.content.strip() + ' [/INST]' }}{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}"
        "{% endif %}{% endfor %}",
        "</s>",
        trimmed,
    ),
    "llama3": Template(LLAMA3, "<|eot_id|>", trimmed),
    "mistral": Template(
        BRACKETS + "[INST] {{ said + '\n\n' if loop.last and said }}{{ m.content }}[/INST]"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
        "</s>",
        has_system=False,  # moves it to the last question, which is not there if an answer is the last
    ),
    "mistral-small": Template(
        "{{ bos_token }}" + by_role("[SYSTEM_PROMPT]@[/SYSTEM_PROMPT]", "[INST]@[/INST]", "@{{ eos_token }}", ""),
        "</s>",
    ),
    "gemma": Template(
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        "<end_of_turn>",
        trimmed,
        has_system=False,
    ),
    "phi3": Template(
        by_role("<|system|>\n@<|end|>\n", "<|user|>\n@<|end|>\n", "<|assistant|>\n@<|end|>\n", "<|assistant|>\n")
        + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
        "<|end|>",
    ),
    "zephyr": Template(
        turns("<|{{ m.role }}|>\n", "{{ eos_token }}\n", prompt="<|assistant|>\n"), "</s>"
    ),
    "tulu": Template(
        by_role("<|system|>\n@\n", "<|user|>\n@\n", "<|assistant|>\n@{{ eos_token }}{{ '\n' if not loop.last }}", "<|assistant|>\n"),
        "</s>",
    ),
    "deepseek-v2": Template(
        "{{ bos_token }}" + by_role("@\n\n", "User: @\n\n", "Assistant: @{{ eos_token }}", "Assistant:"),
        "</s>",
    ),
    "deepseek-r1": Template(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{% set said = m.content %}"
        "{% if '</think>' in said %}{% set said = said.split('</think>')[-1] %}{% endif %}"
        "<\uff5cAssistant\uff5c>{{ said }}<\uff5cend\u2581of\u2581sentence\uff5c>{% elif m.role == 'user' %}<\uff5cUser\uff5c>{{ m.content }}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<\uff5cAssistant\uff5c><think>\n{% endif %}",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
        without_thoughts,
    ),
    "command-r": Template(
        "{{ bos_token }}{% set roles = {'system': 'SYSTEM', 'user': 'USER', 'assistant': 'CHATBOT'} %}"
        + turns(
            "<|START_OF_TURN_TOKEN|><|{{ roles[m.role] }}_TOKEN|>",
            "<|END_OF_TURN_TOKEN|>",
            content="m.content.strip()",
            prompt="<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        ),
        "<|END_OF_TURN_TOKEN|>",
        trimmed,
    ),
    "granite": Template(
        turns(
            "<|start_of_role|>{{ m.role }}<|end_of_role|>",
            "<|end_of_text|>\n",
            prompt="<|start_of_role|>assistant<|end_of_role|>",
        ),
        "<|end_of_text|>",
    ),
    "vicuna": Template(
        by_role("@ ", "USER: @ ", "ASSISTANT: @{{ eos_token }}", "ASSISTANT:"), "</s>"
    ),
    "openchat": Template(
        "{{ bos_token }}"
        + turns(
            "GPT4 Correct {{ m.role | title }}: ",
            "<|end_of_turn|>",
            prompt="GPT4 Correct Assistant:",
        ),
        "<|end_of_turn|>",
    ),
    "alpaca": Template(
        by_role("@\n\n", "### Instruction:\n@\n\n", "### Response:\n@{{ eos_token }}\n\n", "### Response:\n"),
        "</s>",
    ),
    "glm4": Template(  # the next header ends a turn, so no token is the turn's own
        "[gMASK]<sop>" + turns("<|{{ m.role }}|>\n", "", prompt="<|assistant|>"), ""
    ),
    "falcon": Template(
        turns("{{ m.role | capitalize }}: ", "\n\n", prompt="Assistant:"), ""
    ),
    "chatml-marked": Template(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{%- generation -%}{{ m.content }}<|im_end|>{%- endgeneration %}{% else %}{{ m.content }}<|im_end|>"
        "{% endif %}{{ '\n' }}{% endfor %}",
        "<|im_end|>",
    ),
    "llama3-marked": Template(
        LLAMA3.replace(
            "{{ m['content'] | trim }}<|eot_id|>",
            "{% if m.role == 'assistant' %}{% generation %}{{ m['content'] | trim }}<|eot_id|>"
            "{% endgeneration %}{% else %}{{ m['content'] | trim }}<|eot_id|>{% endif %}",
        ),
        "<|eot_id|>",
        trimmed,
    ),
}  # fmt: skip
SPECIAL = [
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "[INST]",
    "[/INST]", "<|END_OF_TURN_TOKEN|>", "<|end_of_text|>", "<|end_of_turn|>", "[gMASK]", "<sop>", "</think>",
]  # fmt: skip

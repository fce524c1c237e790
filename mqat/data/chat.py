"""Conversations as tokens, and which of the tokens are an assistant's answer."""

from collections.abc import Sequence
from typing import Any

from mqat.data.documents import Message
from mqat.errors import UserError

_WITHOUT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}"
    "{% endfor %}"
)


def chat_template(tokenizer: Any) -> str | None:
    """The tokenizer's template for plain conversations; None: it has none.

    Raises:
        UserError: It has several, and none of them is called `default`, as transformers asks for.
    """
    template: str | dict[str, str] | None = tokenizer.chat_template
    if not isinstance(template, dict):
        return template
    if "default" not in template:
        raise UserError(
            f"the tokenizer has the chat templates {sorted(template)} and none called 'default', so "
            "none can be chosen; name one of them 'default' in tokenizer_config.json"
        )
    return template["default"]


def _render(tokenizer: Any, messages: Sequence[Message], *, prompt: bool) -> str:
    from jinja2 import TemplateError

    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=prompt,
                chat_template=chat_template(tokenizer) or _WITHOUT_TEMPLATE,
            )
        )
    except TemplateError as error:
        raise UserError(f"the tokenizer's chat template refuses it: {error}") from error


def _answer_spans(tokenizer: Any, messages: Sequence[Message], whole: str) -> list[tuple[int, int]]:
    """Character ranges of the answers with their end tokens."""
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        # Most templates cannot render an empty conversation.
        before = _render(tokenizer, messages[:index], prompt=True) if index else ""
        after = _render(tokenizer, messages[: index + 1], prompt=False)
        if not (whole.startswith(after) and after.startswith(before)):
            raise UserError(
                "the tokenizer's chat template rewrites earlier messages, so answers cannot be "
                "told from questions; set a template that only appends, or one with "
                "{% generation %} marks"
            )
        spans.append((len(before), len(after.rstrip("\n"))))
    return spans


def tokenize_conversation(
    messages: Sequence[Message], tokenizer: Any
) -> tuple[list[int], list[bool]]:
    """Token ids, and which of them belong to an assistant's answer (its end token included).

    A template with `{% generation %}` marks says itself what an answer is. For others, answers are
    found by rendering the conversation up to before and after each of them, so any template works
    whose text for a prefix is a prefix of its text for the whole. Without a template, messages
    follow each other on lines and answers close with the end token.

    Raises:
        ValueError: The template is not of that kind, or refuses the conversation.
    """
    if "{% generation %}" in (chat_template(tokenizer) or "").replace("{%-", "{%"):
        from jinja2 import TemplateError

        try:
            marked = tokenizer.apply_chat_template(
                list(messages), return_dict=True, return_assistant_tokens_mask=True
            )
        except TemplateError as error:
            raise UserError(f"the tokenizer's chat template refuses it: {error}") from error
        return list(marked["input_ids"]), [bool(flag) for flag in marked["assistant_masks"]]
    whole = _render(tokenizer, messages, prompt=False)
    spans = _answer_spans(tokenizer, messages, whole)
    # The template has written the special tokens already.
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    answer = [
        any(start < span_stop and stop > span_start for span_start, span_stop in spans)
        for start, stop in encoded["offset_mapping"]
    ]
    return list(encoded["input_ids"]), answer

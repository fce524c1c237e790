"""A line of chat data in any known spelling -> messages; every other key is refused by name.

Sources of the spellings: OpenAI's and mistral-finetune's `weight`, axolotl's `train` and `training`,
`loss_mask` and `loss` of LLaMA-Factory and ms-swift; Alpaca and ShareGPT as LLaMA-Factory reads them
(instruction, line end, input); prompt and completion as mlx-lm and TRL name them.
"""

import json
from typing import Any

from mqat.errors import UserError

Message = dict[str, Any]
_MARKS = ("weight", "train", "training", "loss_mask", "loss")
REASONING = ("reasoning_content", "reasoning", "thinking")
_MESSAGE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", *REASONING)
_ROLES = ("system", "developer", "user", "assistant", "tool", "ipython")
_SHAREGPT = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "observation": "tool",
} | {role: role for role in _ROLES}
# What describes a line and is no part of what is said (Megatron's loose JSON, Hugging Face's data sets).
HARMLESS = frozenset(
    "id uuid idx index url src source dataset title type category meta metadata timestamp date lang "
    "language license split".split()
)
_FORMS = (
    "'messages', 'conversations', 'input' and 'output', 'instruction', 'prompt' and 'completion'"
)
# Layouts by the keys that tell them; the first whose keys are all there.
_KNOWN = {
    "messages": ("messages",),
    "ShareGPT": ("conversations",),
    "Alpaca": ("instruction", "output"),
    "input and output": ("input", "output"),
    "prompt and completion": ("prompt", "completion"),
    "text": ("text",),
}
# Those that people have and that are not read: keys -> whose, and what to do.
_REFUSED = {
    ("chosen", "rejected"): "preference pairs; training here is on answers, so keep the chosen one",
    ("instruction", "response"): "Dolly's layout; call 'response' 'output' and 'context' 'input'",
    ("question", "answer"): "question and answer; call them 'input' and 'output'",
    ("prompt", "response"): "prompt and response; call them 'prompt' and 'completion'",
    ("query", "response"): "query and response; call them 'input' and 'output'",
    ("dialogue",): "a list of turns without speakers; write 'messages' with roles",
    ("dialog",): "a list of turns without speakers; write 'messages' with roles",
    ("text",): "plain text; set model.data.format=text",
}


def said(value: Any) -> dict[str, Any]:
    """A JSON object without the keys that are null: those are not said.

    Raises:
        UserError: Not an object.
    """
    if not isinstance(value, dict):
        raise UserError("expected a JSON object")
    return {key: entry for key, entry in value.items() if entry is not None}


def _refuse_unknown(keys: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    unknown = [key for key in keys if key not in known]
    if unknown:
        raise UserError(f"unknown key {unknown[0]!r} in {where}; known are {sorted(known)}")


def _is_trained(message: dict[str, Any], role: str) -> bool:
    """Whether the message is learnt; only an assistant's can be."""
    marks = {}
    for key in _MARKS:
        if key in message:
            value = message.pop(key)
            if not isinstance(value, bool | int | float) or value not in (0, 1):
                raise UserError(f"{key}={value!r} of a message: must be 0, 1, true or false")
            marks[key] = bool(value)
    if len(set(marks.values())) > 1:
        raise UserError(f"the marks of a message contradict each other: {marks}")
    wanted = [key for key, value in marks.items() if value]
    if role != "assistant" and wanted:
        raise UserError(
            f"{wanted[0]!r} asks for training on a message of role {role!r}; only answers are"
        )
    return role == "assistant" and all(marks.values())


def _text(content: Any) -> str:
    """The text of a message, whose content may be a list of text parts, as APIs write it."""
    if isinstance(content, list) and all(
        isinstance(part, dict)
        and set(part) == {"type", "text"}
        and part["type"] == "text"
        and isinstance(part["text"], str)
        for part in content
    ):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise UserError(
            "every message needs the strings 'role' and 'content' (text parts are read, too)"
        )
    return content


def _check_calls(calls: Any) -> None:
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function", call) if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name.strip():
            raise UserError("'tool_calls' must be a list of objects whose 'function' has a 'name'")


def read_message(value: Any) -> Message:
    """A message as chat templates take it, with `weight` 0 if it is not learnt.

    Raises:
        UserError: A key, role or value that is not understood, or an answer without words.
    """
    if not isinstance(value, dict):
        raise UserError("every message needs the strings 'role' and 'content'")
    message = said(value)
    role = message.get("role")
    if not isinstance(role, str):
        raise UserError("every message needs the strings 'role' and 'content'")
    if role not in _ROLES:
        raise UserError(f"unknown role {role!r}; known are {list(_ROLES)}")
    is_trained = _is_trained(message, role)
    _refuse_unknown(message, (*_MESSAGE_KEYS, *_MARKS), "a message")
    if not message.get("tool_calls", True):
        del message["tool_calls"]
    for key in ("name", "tool_call_id", *REASONING):
        if not isinstance(message.get(key, ""), str):
            raise UserError(f"{key}={message[key]!r} of a message must be a string")
    more = [key for key in ("tool_calls", *REASONING) if key in message]
    if more and role != "assistant":
        raise UserError(f"{more[0]!r} belongs to a message of role 'assistant', not {role!r}")
    if "tool_calls" in message:
        _check_calls(message["tool_calls"])
    message["content"] = _text(message.get("content", "" if "tool_calls" in message else None))
    is_empty = not message["content"].strip() and "tool_calls" not in message
    if is_trained and is_empty:
        raise UserError("a message of role 'assistant' has neither words nor a tool call")
    return message if is_trained or role != "assistant" else message | {"weight": 0}


def _messages(value: Any, key: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{key!r} must be a list that is not empty")
    return value


def _from_sharegpt(value: Any) -> Any:
    if not isinstance(value, dict) or "from" not in value:
        return value
    message = said(value)
    _refuse_unknown(message, ("from", "value", *_MARKS), "a message with 'from'")
    speaker = message.pop("from", None)
    if not isinstance(speaker, str) or speaker not in _SHAREGPT:
        raise UserError(f"unknown speaker {speaker!r}; known are {sorted(_SHAREGPT)}")
    return {"role": _SHAREGPT[speaker], "content": message.pop("value", None), **message}


def _pair(question: Any, answer: Any, keys: str) -> list[Any]:
    if not isinstance(question, str) or not isinstance(answer, str):
        raise UserError(f"expected the strings {keys}")
    if not question.strip():
        raise UserError(f"a question without words (the strings {keys})")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _completion(prompt: Any, completion: Any) -> list[Any]:
    """Strings, or lists of messages, of which only the completion's are learnt."""
    if not isinstance(prompt, list):
        return _pair(prompt, completion, "'prompt' and 'completion'")
    before = [read_message(message) for message in _messages(prompt, "prompt")]
    before = [m | {"weight": 0} if m["role"] == "assistant" else m for m in before]
    return [*before, *_messages(completion, "completion")]


def form_of(row: dict[str, Any]) -> str:
    """What people call the layout of a record that was read."""
    return next(form for form, keys in _KNOWN.items() if all(key in row for key in keys))


def _said_by_form(row: dict[str, Any]) -> list[Any]:
    """Takes the keys of the row's form out of it."""
    if "messages" in row:
        return _messages(row.pop("messages"), "messages")
    if "conversations" in row:
        turns = _messages(row.pop("conversations"), "conversations")
        return [_from_sharegpt(turn) for turn in turns]
    if "instruction" in row and "output" in row:
        parts = [row.pop("instruction"), row.pop("input", "")]
        if not all(isinstance(part, str) for part in parts):
            raise UserError("expected the strings 'instruction', 'input' and 'output'")
        question = "\n".join(part for part in parts if part.strip())
        return _pair(question, row.pop("output"), "'instruction', 'input' and 'output'")
    if "input" in row and "output" in row:
        return _pair(row.pop("input"), row.pop("output"), "'input' and 'output'")
    if "prompt" in row and "completion" in row:
        return _completion(row.pop("prompt"), row.pop("completion"))
    for keys, what in _REFUSED.items():
        if all(key in row for key in keys):
            raise UserError(f"expected {_FORMS}; this looks like {what}")
    raise UserError(f"expected {_FORMS} (the strings 'input' and 'output', ...)")


def _tools(value: Any) -> list[Any]:
    """Tool definitions; some data sets store them as JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise UserError(f"'tools' is a string that is not JSON ({error})") from error
    functions = value if isinstance(value, list) else [None]
    functions = [f.get("function", f) if isinstance(f, dict) else None for f in functions]
    if not all(isinstance(f, dict) and isinstance(f.get("name"), str) for f in functions):
        raise UserError("'tools' must be a list of objects whose 'function' has a 'name'")
    return list(value)


def read_row(value: Any) -> tuple[list[Message], list[Any]]:
    """Messages and tool definitions of one line of chat data.

    Raises:
        UserError: No form that is known, or a key or value that is not understood.
    """
    row = {key: entry for key, entry in said(value).items() if key not in HARMLESS}
    tools = _tools(row.pop("tools", []))
    system = row.pop("system", "")
    if not isinstance(system, str):
        raise UserError("'system' must be a string")
    messages = [read_message(message) for message in _said_by_form(row)]
    _refuse_unknown(row, ("tools", "system"), "a line of this form")
    if system.strip():
        if messages[0]["role"] == "system":
            raise UserError("'system' and a first message of role 'system' are both there")
        messages.insert(0, {"role": "system", "content": system})
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise UserError(f"no message has the role 'assistant' (roles: {sorted(set(roles))})")
    if not any(m["role"] == "assistant" and m.get("weight", 1) for m in messages):
        raise UserError("every answer is marked as not learnt, so nothing is left to train on")
    return messages, tools

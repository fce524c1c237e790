"""Reads text and conversations from files; every complaint names the file and the line."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mqat.errors import UserError

Message = dict[str, str]
T = TypeVar("T")


@dataclass(frozen=True)
class Conversation:
    """Messages (`role`, `content`) in order; `place` is `file:line`, for complaints."""

    messages: tuple[Message, ...]
    place: str


@dataclass
class ReadStats:
    """What was read, and what reading and packing left out.

    Attributes:
        documents: Documents or conversations read.
        skipped_lines: `file:line: reason` of every line left out under `bad_lines=skip`.
        dropped_tokens: Tokens that fit in no sequence.
        cut_conversations: Conversations that lost their end.
        dropped_conversations: Conversations left out because no answer was within the sequence.
    """

    documents: int = 0
    skipped_lines: list[str] = field(default_factory=list)
    dropped_tokens: int = 0
    cut_conversations: int = 0
    dropped_conversations: int = 0


class BadLines:
    """What happens to a line that cannot be used: an error, or skipped and counted.

    Raises:
        ValueError: `policy` is neither `error` nor `skip`.
    """

    def __init__(self, policy: str, stats: ReadStats) -> None:
        if policy not in ("error", "skip"):
            raise UserError(f"model.data.bad_lines={policy!r}: must be 'error' or 'skip'.")
        self.is_error = policy == "error"
        self.stats = stats

    def report(self, place: str, error: ValueError) -> None:
        """Raises, with the place, or counts."""
        if self.is_error:
            raise UserError(
                f"{place}: {error}. Fix the line, or set model.data.bad_lines=skip."
            ) from error
        self.stats.skipped_lines.append(f"{place}: {error}")


def _bytes_of(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror}. Give the path of a readable file."
        ) from error
    if not content.removeprefix(b"\xef\xbb\xbf").strip():
        raise UserError(f"{path}: the file is empty; give a file with text in it.")
    return content


def _text_of(path: Path) -> str:
    content = _bytes_of(path)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}:{line}: not UTF-8 (byte {error.start}); convert the file, for example with "
            "iconv -t UTF-8."
        ) from error


def _parse_json(line: bytes) -> Any:
    try:
        value = json.loads(line.decode("utf-8"))
        # Escaped lone surrogates are valid JSON but not text: no tokenizer can encode them.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 (byte {error.start} of the line)") from error
    except UnicodeEncodeError as error:
        raise UserError("a lone surrogate (\\ud800 to \\udfff) is not text") from error
    except json.JSONDecodeError as error:
        raise UserError(f"not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise UserError("not usable JSON: nested too deeply") from error
    return value


def _json_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """(`file:line`, content) of every line that is not blank."""
    content = _bytes_of(path).removeprefix(b"\xef\xbb\xbf")
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", line


def _read_jsonl(
    path: Path, parse: Callable[[Any, str], T], bad_lines: str, stats: ReadStats
) -> list[T]:
    records = []
    complaints = BadLines(bad_lines, stats)
    for place, line in _json_lines(path):
        try:
            records.append(parse(_parse_json(line), place))
        except ValueError as error:
            complaints.report(place, error)
    return records


def _conversation(value: Any, place: str) -> Conversation:
    if not isinstance(value, dict):
        raise UserError("expected a JSON object")
    if "messages" in value:
        messages = value["messages"]
        if not isinstance(messages, list) or not messages:
            raise UserError("'messages' must be a list that is not empty")
        for message in messages:
            if not isinstance(message, dict) or not all(
                isinstance(message.get(key), str) for key in ("role", "content")
            ):
                raise UserError("every message needs the strings 'role' and 'content'")
    elif isinstance(value.get("input"), str) and isinstance(value.get("output"), str):
        messages = [
            {"role": "user", "content": value["input"]},
            {"role": "assistant", "content": value["output"]},
        ]
    else:
        raise UserError("expected 'messages', or the strings 'input' and 'output'")
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise UserError(f"no message has the role 'assistant' (roles: {sorted(set(roles))})")
    return Conversation(
        tuple({"role": m["role"], "content": m["content"]} for m in messages), place
    )


def _text_record(value: Any, place: str) -> str:
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise UserError(
            "expected a JSON object with the string 'text' (chat and input/output lines need "
            "model.data.format=sft)"
        )
    if not value["text"].strip():
        raise UserError("'text' is empty")
    return str(value["text"])


def _check_not_empty(found: Sequence[object], what: str, paths: Sequence[Path]) -> None:
    if not found:
        files = ", ".join(str(path) for path in paths)
        raise UserError(
            f"no usable {what} in {files or 'an empty list of files'}; give at least one file with "
            f"a usable {what}."
        )


def read_texts(paths: Sequence[Path], bad_lines: str, stats: ReadStats) -> list[str]:
    """Documents of plain-text files (one each) and of `.jsonl` files (`{"text": ...}` a line).

    Args:
        paths: Files.
        bad_lines: `error`, or `skip`: count and leave out.
        stats: Updated.

    Raises:
        ValueError: Unreadable, empty or not UTF-8; a bad line; or no document at all.
    """
    documents: list[str] = []
    for path in paths:
        if path.suffix == ".jsonl":
            documents += _read_jsonl(path, _text_record, bad_lines, stats)
        else:
            documents.append(_text_of(path))
    _check_not_empty(documents, "document", paths)
    stats.documents += len(documents)
    return documents


def read_conversations(
    paths: Sequence[Path], bad_lines: str, stats: ReadStats
) -> list[Conversation]:
    """Conversations of JSONL files: `{"messages": [...]}` or `{"input": ..., "output": ...}`.

    Arguments and errors as for `read_texts`.
    """
    conversations: list[Conversation] = []
    for path in paths:
        conversations += _read_jsonl(path, _conversation, bad_lines, stats)
    _check_not_empty(conversations, "conversation", paths)
    stats.documents += len(conversations)
    return conversations

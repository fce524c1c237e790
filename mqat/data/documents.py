"""Reads text and conversations from files; every complaint names the file and the line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Message = dict[str, str]


@dataclass
class ReadStats:
    """What reading left out.

    Attributes:
        documents: Documents or conversations read.
        skipped_lines: `file:line: reason` of every line left out under `bad_lines=skip`.
    """

    documents: int = 0
    skipped_lines: list[str] = field(default_factory=list)


def _text_of(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path}:{line}: not UTF-8 (byte {error.start}); convert the file, for example with "
            "iconv -t UTF-8."
        ) from error
    if not text.strip():
        raise ValueError(f"{path}: the file is empty.")
    return text


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """(`file:line`, parsed value or ValueError) of every line that is not blank."""
    for number, line in enumerate(_text_of(path).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            yield place, json.loads(line)
        except json.JSONDecodeError as error:
            yield place, ValueError(f"not JSON: {error.msg} at column {error.colno}")


def _conversation(value: Any) -> list[Message]:
    if not isinstance(value, dict):
        raise ValueError("expected a JSON object")
    if "messages" in value:
        messages = value["messages"]
        if not isinstance(messages, list) or not messages:
            raise ValueError("'messages' must be a list that is not empty")
        for message in messages:
            if not isinstance(message, dict) or not all(
                isinstance(message.get(key), str) for key in ("role", "content")
            ):
                raise ValueError("every message needs the strings 'role' and 'content'")
    elif isinstance(value.get("input"), str) and isinstance(value.get("output"), str):
        messages = [
            {"role": "user", "content": value["input"]},
            {"role": "assistant", "content": value["output"]},
        ]
    else:
        raise ValueError("expected 'messages', or the strings 'input' and 'output'")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no 'assistant' message: nothing to learn from")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def _text_record(value: Any) -> str:
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise ValueError("expected a JSON object with the string 'text'")
    if not value["text"].strip():
        raise ValueError("'text' is empty")
    return str(value["text"])


def _read_jsonl(path: Path, parse: Any, bad_lines: str, stats: ReadStats) -> list[Any]:
    records = []
    for place, value in _json_lines(path):
        try:
            if isinstance(value, ValueError):
                raise value
            records.append(parse(value))
        except ValueError as error:
            if bad_lines == "error":
                raise ValueError(
                    f"{place}: {error}. Fix the line, or set model.data.bad_lines=skip."
                ) from error
            stats.skipped_lines.append(f"{place}: {error}")
    return records


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
    if not documents:
        raise ValueError(f"no document in {[str(path) for path in paths]}.")
    stats.documents += len(documents)
    return documents


def read_conversations(
    paths: Sequence[Path], bad_lines: str, stats: ReadStats
) -> list[list[Message]]:
    """Conversations of JSONL files: `{"messages": [...]}` or `{"input": ..., "output": ...}`.

    Arguments and errors as for `read_texts`.
    """
    conversations: list[list[Message]] = []
    for path in paths:
        conversations += _read_jsonl(path, _conversation, bad_lines, stats)
    if not conversations:
        raise ValueError(f"no conversation in {[str(path) for path in paths]}.")
    stats.documents += len(conversations)
    return conversations

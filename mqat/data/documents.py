"""Reads text and conversations from files; every complaint names the file and the line."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mqat.data.messages import HARMLESS, Message, form_of, read_row, said
from mqat.data.sources import Source, columnar_records, is_columnar
from mqat.data.strict_json import parse_json
from mqat.errors import UserError

T = TypeVar("T")
_JSON_ENDINGS = (".json", ".jsonl", ".ndjson")
_NOT_PROSE = (
    ".csv",
    ".tsv",
    ".arrow",
    ".bin",
    ".idx",
    ".gz",
    ".zst",
    ".bz2",
    ".xz",
    ".zip",
)


@dataclass(frozen=True)
class Conversation:
    """Messages (`messages.read_message`) in order; `place` is `file:line`, for complaints."""

    messages: tuple[Message, ...]
    place: str
    tools: tuple[Any, ...] = ()


@dataclass
class ReadStats:
    """What was read, and what reading and packing left out.

    Attributes:
        documents: Documents or conversations read.
        skipped_lines: `file:line: reason` of every line left out under `bad_lines=skip`.
        dropped_tokens: Tokens that fit in no sequence.
        cut_conversations: Conversations that lost their end.
        dropped_conversations: Conversations left out because no answer was within the sequence.
        forms: Layout of the records -> how many of them were read.
    """

    documents: int = 0
    skipped_lines: list[str] = field(default_factory=list)
    dropped_tokens: int = 0
    cut_conversations: int = 0
    dropped_conversations: int = 0
    forms: Counter[str] = field(default_factory=Counter)


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
    if path.suffix.lower() in _NOT_PROSE:
        raise UserError(
            f"{path}: {path.suffix} files are not read; unpack or convert it to text or JSON lines."
        )
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


def _refuse_constant(name: str) -> None:
    raise UserError(f"not JSON: {name} is no number")


def _parse_json(line: bytes) -> Any:
    try:
        text = line.decode("utf-8")
        value = parse_json(text, parse_constant=_refuse_constant)
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


def _parsed(text: bytes) -> Any:
    """The JSON value, or None where it is none."""
    try:
        return _parse_json(text)
    except ValueError:
        return None


def _json_records(path: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(place, what parses it) of every record: lines, or the entries of one JSON array or object."""
    content = _bytes_of(path).removeprefix(b"\xef\xbb\xbf")
    lines = [(number, line) for number, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    if _parsed(lines[0][1]) is None or lines[0][1].lstrip().startswith(b"["):
        whole = _parsed(content)
        if isinstance(whole, list | dict) and whole != []:
            for number, value in enumerate(whole if isinstance(whole, list) else [whole], start=1):
                yield f"{path}, record {number}", lambda value=value: value  # type: ignore[misc]
            return
    for number, line in lines:
        yield f"{path}:{number}", lambda line=line: _parse_json(line)  # type: ignore[misc]


def _holds_json(path: Path) -> bool:
    """By its ending, or by content: the first line or the whole file is an object or a list of them."""
    content = _bytes_of(path).removeprefix(b"\xef\xbb\xbf").strip()
    if path.suffix.lower() in _JSON_ENDINGS:
        return True
    if not content.startswith((b"{", b"[")):
        return False
    found = [_parsed(content.split(b"\n", 1)[0]), _parsed(content)]
    return any(isinstance(v[0] if isinstance(v, list) and v else v, dict) for v in found)


def _read_records(
    source: Source,
    parse: Callable[[Any, str], T],
    bad_lines: str,
    stats: ReadStats,
    columns: Sequence[str],
) -> list[T]:
    records = []
    complaints = BadLines(bad_lines, stats)
    found = columnar_records(source) if is_columnar(source) else _json_records(Path(str(source)))
    for place, read in found:
        try:
            value = said(read())
            kept = {key: value[key] for key in value if not columns or key in columns}
            records.append(parse(kept, place))
            stats.forms[form_of(kept)] += 1
        except ValueError as error:
            complaints.report(place, error)
    return records


def _conversation(value: Any, place: str) -> Conversation:
    messages, tools = read_row(value)
    return Conversation(tuple(messages), place, tuple(tools))


def _text_record(value: Any, place: str) -> str:
    record = said(value)
    if not isinstance(record.get("text"), str):
        raise UserError(
            "expected a JSON object with the string 'text' (chat and input/output lines need "
            "model.data.format=sft)"
        )
    unknown = [key for key in record if key != "text" and key not in HARMLESS]
    if unknown:
        raise UserError(f"unknown key {unknown[0]!r} beside 'text'; remove what is not trained on")
    if not record["text"].strip():
        raise UserError("'text' is empty")
    return str(record["text"])


def _check_not_empty(found: Sequence[object], what: str, sources: Sequence[Source]) -> None:
    if not found:
        files = ", ".join(map(str, sources))
        raise UserError(
            f"no usable {what} in {files or 'an empty list of files'}; give at least one file with "
            f"a usable {what}."
        )


def read_texts(
    sources: Sequence[Source], bad_lines: str, stats: ReadStats, columns: Sequence[str] = ()
) -> list[str]:
    """Documents of plain-text files (one each) and of records (`{"text": ...}`).

    JSON is recognized by content, whatever a file is called: an object a line, or one array of them.

    Args:
        sources: Files, and data sets (`sources.resolve`).
        bad_lines: `error`, or `skip`: count and leave out.
        stats: Updated.
        columns: Keys of a record that are read; the others are left aside. Empty: all are.

    Raises:
        ValueError: Unreadable, empty or not UTF-8; a bad line; or no document at all.
    """
    documents: list[str] = []
    for source in sources:
        if is_columnar(source) or _holds_json(Path(str(source))):
            documents += _read_records(source, _text_record, bad_lines, stats, columns)
        else:
            documents.append(_text_of(Path(str(source))))
    _check_not_empty(documents, "document", sources)
    stats.documents += len(documents)
    return documents


def read_conversations(
    sources: Sequence[Source], bad_lines: str, stats: ReadStats, columns: Sequence[str] = ()
) -> list[Conversation]:
    """Conversations of records, in the forms that `messages.read_row` knows.

    Arguments and errors as for `read_texts`.
    """
    conversations: list[Conversation] = []
    for source in sources:
        conversations += _read_records(source, _conversation, bad_lines, stats, columns)
    _check_not_empty(conversations, "conversation", sources)
    stats.documents += len(conversations)
    return conversations

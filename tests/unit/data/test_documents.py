from __future__ import annotations

import json
from pathlib import Path

import pytest

from mqat.data.documents import ReadStats, read_conversations, read_texts

GOOD = b'{"input": "q", "output": "a"}'


def write(path: Path, *lines: bytes) -> Path:
    path.write_bytes(b"\n".join(lines))
    return path


def test_pairs_and_messages_become_conversations(tmp_path: Path) -> None:
    messages = b'{"messages": [{"role": "assistant", "content": "hi", "refusal": null}], "id": 7}'
    file = write(tmp_path / "a.jsonl", GOOD, b"", messages + b"\r")
    stats = ReadStats()
    first, second = read_conversations([file], "error", stats)
    assert [m["role"] for m in first.messages] == ["user", "assistant"]
    assert second.messages == ({"role": "assistant", "content": "hi"},)
    assert second.place == f"{file}:3"
    assert stats.documents == 2


BAD_LINES = [
    (b"{", "not JSON"),
    (b"\xff\xfe", "not UTF-8"),
    (b"[]", "expected a JSON object"),
    (b"{}", "expected 'messages'"),
    (b'{"input": 1, "output": "a"}', "the strings 'input' and 'output'"),
    (b'{"messages": []}', "not empty"),
    (b'{"messages": [{"role": "user"}]}', "'role' and 'content'"),
    (b'{"messages": [{"role": "human", "content": "x"}]}', r"unknown role 'human'; known are"),
    (b'{"messages": [{"role": "user", "content": "x"}]}', r"role 'assistant' \(roles: \['user'"),
    (b'{"input": "q", "output": "a", "score": 1}', "unknown key 'score'"),
    (b'{"input": " ", "output": "a"}', "question without words"),
    (b'{"input": "q", "output": ""}', "neither words nor a tool call"),
    (b'{"input": "q", "output": "a", "output": "b"}', "'output' is there twice"),
    (b'{"instruction": "q", "output": "a", "history": []}', "unknown key 'history'"),
    (b'{"question": "q", "answer": "a"}', "expected 'messages'.* call them 'input' and 'output'"),
    (b'{"prompt": "q", "chosen": "a", "rejected": "b"}', "looks like preference pairs"),
    (b'{"instruction": "q", "context": "", "response": "a"}', "Dolly's layout; call 'response'"),
    (b'{"text": "once"}', "plain text; set model.data.format=text"),
    (
        b'{"conversations": [{"from": "human", "value": "q"}, {"from": "bot", "value": "a"}]}',
        "'bot'",
    ),
    (
        b'{"messages": [{"role": "assistant", "content": "a", "weight": 0}]}',
        "nothing is left to train",
    ),
    (b'{"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}', "must be 0, 1"),
    (
        b'{"messages": [{"role": "assistant", "content": "a", "weight": 1, "train": false}]}',
        "contradict",
    ),
    (b'{"messages": [{"role": "user", "content": "a", "train": true}]}', "asks for training"),
    (
        b'{"messages": [{"role": "assistant", "content": "a", "mask": 1}]}',
        "unknown key 'mask' in a",
    ),
    (
        b'{"messages": [{"role": "assistant", "content": [{"type": "image_url"}]}]}',
        "'role' and 'content'",
    ),
    (b'{"tools": [1], "input": "q", "output": "a"}', "'tools' must be a list"),
    (b'{"input": "q", "output": "a", "weight": NaN}', "NaN is no number"),
    (b'{"input": "\\ud800", "output": "a"}', "surrogate"),
    (b"[" * 100_000, "nested too deeply"),
    (b"1" * 5000, "integer string conversion"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_a_bad_line_is_an_error_with_file_and_line(
    tmp_path: Path, line: bytes, reason: str
) -> None:
    file = write(tmp_path / "a.jsonl", GOOD, b"", line, GOOD)
    with pytest.raises(ValueError, match=rf"a\.jsonl:3: .*{reason}.*bad_lines=skip"):
        read_conversations([file], "error", ReadStats())


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_a_bad_line_is_skipped_and_counted_if_asked(
    tmp_path: Path, line: bytes, reason: str
) -> None:
    file = write(tmp_path / "a.jsonl", GOOD, b"", line, GOOD)
    stats = ReadStats()
    assert len(read_conversations([file], "skip", stats)) == 2
    assert len(stats.skipped_lines) == 1
    assert stats.skipped_lines[0].startswith(f"{file}:3: ")


def test_text_files_are_one_document_and_jsonl_files_one_a_line(tmp_path: Path) -> None:
    plain = write(tmp_path / "a.txt", b"\xef\xbb\xbfone", b"two")
    lines = write(tmp_path / "b.jsonl", b'\xef\xbb\xbf{"text": "\xc3\xa9"}', b'{"text": "x"}')
    assert read_texts([plain, lines], "error", ReadStats()) == ["one\ntwo", "é", "x"]
    bad = write(tmp_path / "c.jsonl", b'{"text": " "}')
    with pytest.raises(ValueError, match=r"c\.jsonl:1: 'text' is empty"):
        read_texts([bad], "error", ReadStats())


@pytest.mark.parametrize("read", [read_texts, read_conversations])
def test_unusable_files_are_refused_by_name(tmp_path: Path, read: object) -> None:
    assert callable(read)
    with pytest.raises(ValueError, match=r"none\.jsonl: cannot be read: No such file"):
        read([tmp_path / "none.jsonl"], "error", ReadStats())
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        read([tmp_path], "error", ReadStats())
    empty = write(tmp_path / "empty.jsonl", b"\xef\xbb\xbf \n")
    with pytest.raises(ValueError, match=r"empty\.jsonl: the file is empty"):
        read([empty], "skip", ReadStats())
    all_bad = write(tmp_path / "bad.jsonl", b"{")
    with pytest.raises(ValueError, match=r"no usable .* in .*bad\.jsonl"):
        read([all_bad], "skip", ReadStats())
    with pytest.raises(ValueError, match="bad_lines='ignore': must be"):
        read([all_bad], "ignore", ReadStats())


def test_a_plain_file_that_is_not_utf8_is_refused_with_the_line(tmp_path: Path) -> None:
    file = write(tmp_path / "latin1.txt", b"fine", b"caf\xe9")
    with pytest.raises(ValueError, match=r"latin1\.txt:2: not UTF-8 \(byte 8\).*iconv"):
        read_texts([file], "error", ReadStats())


def messages_of(tmp_path: Path, row: object, name: str = "a.jsonl") -> list[tuple[str, str]]:
    (tmp_path / name).write_text(json.dumps(row), encoding="utf-8")
    (conversation,) = read_conversations([tmp_path / name], "error", ReadStats())
    return [(m["role"], m["content"]) for m in conversation.messages]


PAIR = [("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "do", "input": "it", "output": "a"}, [("user", "do\nit"), PAIR[1]]),
        ({"instruction": "q", "input": "", "output": "a", "id": 1}, PAIR),
        ({"instruction": "q", "output": "a", "system": "s"}, [("system", "s"), *PAIR]),
        ({"prompt": "q", "completion": "a"}, PAIR),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            PAIR,
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]},
                          {"role": "assistant", "content": "a", "tool_calls": []}]},
            PAIR,
        ),
    ],
)  # fmt: skip
def test_the_forms_that_people_use_are_read(tmp_path: Path, row: object, expected: object) -> None:
    assert messages_of(tmp_path, row) == expected


@pytest.mark.parametrize("name", ["a.json", "a.NDJSON", "a.txt"])
def test_json_is_recognized_whatever_a_file_is_called(tmp_path: Path, name: str) -> None:
    rows = [{"text": "one"}, {"text": "two", "url": "u"}]
    for text in ("\n".join(map(json.dumps, rows)), json.dumps(rows, indent=1)):
        (tmp_path / name).write_text(text)
        assert read_texts([tmp_path / name], "error", ReadStats()) == ["one", "two"]
    assert messages_of(tmp_path, [{"input": "q", "output": "a"}], name) == PAIR


def test_prose_that_begins_with_a_bracket_stays_prose(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", b"[1] a note", b"{more}")
    assert read_texts([file], "error", ReadStats()) == ["[1] a note\n{more}"]
    for name in ("a.arrow", "a.CSV", "a.jsonl.gz"):
        with pytest.raises(ValueError, match="files are not read; unpack or convert"):
            read_texts([write(tmp_path / name, b"x")], "error", ReadStats())


def test_keys_beside_a_text_are_harmless_or_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", b'{"text": "x", "url": "u", "id": 3, "meta": {}}')
    assert read_texts([file], "error", ReadStats()) == ["x"]
    file = write(tmp_path / "a.jsonl", b'{"text": "x", "answer": "y"}')
    with pytest.raises(ValueError, match="unknown key 'answer' beside 'text'"):
        read_texts([file], "error", ReadStats())


def test_of_a_prompt_in_messages_only_the_completion_is_learnt(tmp_path: Path) -> None:
    def say(role: str, text: str) -> dict[str, str]:
        return {"role": role, "content": text}

    row = {"prompt": [say("user", "q"), say("assistant", "old"), say("user", "r")],
           "completion": [say("assistant", "new")]}  # fmt: skip
    file = write(tmp_path / "a.jsonl", json.dumps(row).encode())
    (conversation,) = read_conversations([file], "error", ReadStats())
    assert [m.get("weight", 1) for m in conversation.messages] == [1, 0, 1, 1]

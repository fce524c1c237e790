from __future__ import annotations

from pathlib import Path

import pytest

from mqat.data.documents import ReadStats, read_conversations, read_texts

GOOD = b'{"input": "q", "output": "a"}'


def write(path: Path, *lines: bytes) -> Path:
    path.write_bytes(b"\n".join(lines))
    return path


def test_pairs_and_messages_become_conversations(tmp_path: Path) -> None:
    messages = b'{"messages": [{"role": "assistant", "content": "hi", "name": "x"}]}'
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
    (b'{"messages": [{"role": "human", "content": "x"}]}', r"role 'assistant' \(roles: \['human'"),
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

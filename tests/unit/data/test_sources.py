"""Patterns, parquet files and data sets by name; layouts are recognized by their keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mqat.data import sources
from mqat.data.documents import ReadStats, read_conversations
from mqat.data.sources import HubSource, resolve
from mqat.errors import UserError

CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}
OTHER = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [CALL]}]},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [OTHER]}]},
]


def json_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_a_pattern_is_the_files_it_matches_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.txt", "deep/d.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert resolve([f"{tmp_path}/*.jsonl"], "k") == [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    assert resolve([f"{tmp_path}/**/*.jsonl"], "k")[-1] == tmp_path / "deep" / "d.jsonl"
    (tmp_path / "[x].txt").touch()  # a name that is there is no pattern
    assert resolve([tmp_path / "[x].txt"], "k") == [tmp_path / "[x].txt"]
    with pytest.raises(UserError, match=r"k: .*/\*\.csv: no file matches"):
        resolve([f"{tmp_path}/*.csv"], "k")


def test_what_needs_a_package_is_refused_by_its_name(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(sources, "find_spec", lambda _: None)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(UserError, match=r"a\.parquet: the package 'pyarrow' is not installed"):
        resolve([tmp_path / "a.parquet"], "k")
    with pytest.raises(UserError, match=r"hub:a/b: the package 'datasets' is not installed"):
        resolve(["hub:a/b"], "k")


def test_a_data_set_is_named_with_its_split(monkeypatch: Any) -> None:
    monkeypatch.setattr(sources, "find_spec", lambda _: True)
    named = "hub:owner/name?split=train[:5]&name=default"
    assert resolve([named], "k") == [HubSource("owner/name", "train[:5]", "default")]
    for wrong, match in (
        ("hub:a/b?spilt=x", "unknown option 'spilt'; did you mean 'split'"),
        ("hub:a/b?train", "bad query field"),
        ("hub:?split=x", "names no data set"),
    ):
        with pytest.raises(UserError, match=match):
            resolve([wrong], "k")


def test_layouts_are_counted_by_name_and_columns_left_aside(tmp_path: Path) -> None:
    file = json_lines(
        tmp_path / "a.jsonl",
        [
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            {"instruction": "q", "input": "", "output": "a", "score": 3},
            {"messages": ROWS[0]["messages"], "prompt": "q"},
        ],
    )
    columns = ["messages", "conversations", "instruction", "input", "output"]
    stats = ReadStats()
    assert len(read_conversations([file], "error", stats, columns)) == 3
    assert stats.forms == {"ShareGPT": 1, "Alpaca": 1, "messages": 1}
    with pytest.raises(UserError, match="unknown key 'score'"):  # control
        read_conversations([file], "error", ReadStats())


@pytest.mark.parametrize("form", ["parquet", "data set"])
def test_columnar_rows_are_those_of_json_lines(tmp_path: Path, form: str, monkeypatch: Any) -> None:
    why = "pip install 'mqat[data]' for the tests of parquet and data sets"
    pyarrow, parquet = (
        pytest.importorskip(package, reason=why) for package in ("pyarrow", "pyarrow.parquet")
    )
    expected = read_conversations([json_lines(tmp_path / "a.jsonl", ROWS)], "error", ReadStats())
    if form == "parquet":
        source: Any = tmp_path / "a.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), source)
        # Columns of structs have all keys that any row has: this is what null means there.
        (call,) = parquet.read_table(source).to_pylist()[1]["messages"][1]["tool_calls"]
        assert call["function"]["arguments"] == {"at": "sky", "a": None, "b": None}
    else:
        pytest.importorskip("datasets", reason=why)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        directory = tmp_path / "named"
        directory.mkdir()
        json_lines(directory / "train.jsonl", ROWS)
        (source,) = resolve([f"hub:{directory}?split=train"], "k")
    found = read_conversations([source], "error", ReadStats())
    assert [c.messages for c in found] == [c.messages for c in expected]
    assert found[1].place == f"{source}, record 2"


def test_what_is_no_parquet_and_no_data_set_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    why = "pip install 'mqat[data]' for the tests of parquet and data sets"
    pytest.importorskip("datasets", reason=why)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"a\.parquet: not a parquet file"):
        read_conversations([tmp_path / "a.parquet"], "error", ReadStats())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"hub:.*none\?split=train: cannot be loaded"):
        read_conversations([HubSource(str(tmp_path / "none"))], "error", ReadStats())

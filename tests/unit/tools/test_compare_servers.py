"""The table of differences between servers: its figures, and what is asked again."""

import json
from pathlib import Path

import pytest

from tools import compare_servers
from tools.compare_servers import Workshop, difference, markdown, write_between

TRAINER = {"logs": [[-1.0, -2.0], [-3.0, -2.0]], "texts": [[1, 2], [3, 4]]}
SERVER = {"logs": [[-1.5, -2.0], [-3.0, -1.5]], "texts": [[1, 2], [3, 5]]}


def test_a_difference_is_the_mean_over_tokens():
    found = difference(TRAINER, SERVER)
    assert found.mean == 0.25 and (found.texts, found.of_texts) == (1, 2)
    assert found.perplexity == pytest.approx(2.718281828**2)
    assert difference(TRAINER, TRAINER).mean == 0
    with pytest.raises(ValueError, match="shorter"):
        difference(TRAINER, {"logs": [[-1.0], [-3.0, -2.0]], "texts": []})


def test_a_row_says_what_was_asked_and_what_was_refused(tmp_path):
    reader = SERVER | {"noisy": TRAINER["logs"]}
    answers = {"trainer": TRAINER, "reader": reader, "vllm": {"error": "ValueError: no kernel"}}
    table = markdown({"int8": answers})
    row = "| `int8` | float32 | 7.389 | 2.5e-01 | 2.5e-01 (1/2) | - | refused | - | - |"
    assert table.splitlines()[-1] == row
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- served -->\nold\n<!-- end of served -->\nb\n")
    write_between(page, table)
    assert page.read_text() == f"a\n<!-- served -->\n{table}<!-- end of served -->\nb\n"


def test_what_was_answered_is_not_asked_again(tmp_path, monkeypatch):
    asked = []

    def run(command, log, *, sees_mqat, preload=None):
        if "--jobs" not in command:
            Path(command[-1]).mkdir(parents=True)  # import and export: `--out`
            return
        jobs = json.loads(Path(command[command.index("--jobs") + 1]).read_text())
        asked.append((command[2], [job["dtype"] for job in jobs], sees_mqat))
        for job in jobs:
            Path(job["answer"]).write_text(json.dumps(TRAINER))

    monkeypatch.setattr(compare_servers, "_run", run)
    monkeypatch.setattr(Workshop, "_request", lambda self: self.work / "request.json")
    workshop = Workshop(tmp_path, Path("python-of-vllm"))
    found = workshop.answers(["plain"])
    assert found["plain"] == dict.fromkeys(("trainer", "reader", "transformers", "vllm"), TRAINER)
    assert asked == [
        ("trainer", ["float32"], True), ("reader", ["float32"], True),
        ("transformers", ["float32"], True), ("vllm", ["float32"], False),
    ]  # fmt: skip
    asked.clear()
    workshop.answers(["plain", "plain_bf16"])
    assert [dtypes for _, dtypes, _ in asked] == [["bfloat16"]] * 4
    asked.clear()
    assert Workshop(tmp_path, None).answers(["plain"]) == found and not asked

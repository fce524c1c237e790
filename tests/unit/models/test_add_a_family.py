"""The example of docs/add-a-family.md, done to a copy of the repository and run there."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "add-a-family.md"
# A path alone in a sentence's end, or the text of a block with its language.
_PIECE = re.compile(r"`([\w/]+\.\w+)`:\n|^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks() -> list[tuple[str, str, str]]:
    """(path that was named last, language, text) of each block."""
    found, path = [], ""
    for match in _PIECE.finditer(PAGE.read_text("utf-8")):
        path = match[1] or path
        if match[2]:
            found.append((path, match[2], match[3]))
    return found


def apply_diff(file: Path, diff: str) -> None:
    """Lines with a minus, and those without a sign around them, are there once."""
    lines = diff.splitlines(keepends=True)
    old = "".join(line[1:] for line in lines if line[0] in " -")
    new = "".join(line[1:] for line in lines if line[0] in " +")
    text = file.read_text("utf-8")
    assert text.count(old) == 1, f"{file.name} has not once: {old}"
    file.write_text(text.replace(old, new), "utf-8")


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """A copy of the repository with the page's changes, and its commands."""
    copy, commands = tmp_path_factory.mktemp("repository"), []
    for folder in ("mqat", "tests", "tools", "docs"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    for path, language, text in blocks():
        file = copy / path
        if language == "diff":
            apply_diff(file, text)
        elif language == "sh":
            commands += text.splitlines()
        else:
            assert not file.exists()
            file.write_text(text, "utf-8")
    return copy, commands


def run(command: str, copy: Path) -> str:
    python, _, arguments = command.partition(" ")
    assert python == "python"
    words, _, target = arguments.partition(" > ")
    done = subprocess.run(
        [sys.executable, *shlex.split(words)], cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy)}, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    if target:
        (copy / target).write_text(done.stdout, "utf-8")
    return done.stdout


def test_the_page_adds_a_family_that_transformers_and_verify_agree_with(changed):
    copy, commands = changed
    tests, table = (run(command, copy) for command in commands)
    assert "3 passed" in tests  # two models, and that there are facts
    assert "| `arcee` | RMSNorm | relu2 | rotary | plain | - | - |" in table
    assert "arcee" not in (ROOT / "docs" / "families.md").read_text("utf-8")

"""Documentation to rely on: commands, keys, data lines, messages, public names, the built site."""

import argparse
import ast
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import mqat
from mqat.cli.__main__ import COMMANDS, build_parser
from mqat.config import load_config
from mqat.data.documents import ReadStats, read_conversations, read_texts
from mqat.errors import UserError
from tools.docs_nav import present

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
READ = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
_START = re.compile(r"^(?:\w+=\S+ )*(mqat|torchrun|python3?|\.venv/bin/\w+) ")
_KEY = re.compile(r"^(trainer|model|quantization|export|exp_manager)\.[\w.]+=")


def blocks(page, kind):
    """Fenced blocks of a language, with the rest of the words after it."""
    fences = re.finditer(
        r"^```(\w+)(?: ([^\n]*))?\n(.*?)^```", page.read_text("utf-8"), re.M | re.S
    )
    return [(fence[2], fence[3]) for fence in fences if fence[1] == kind]


def commands(page):
    """Lines of code that start with a command, continued lines joined, comments left out."""
    text = page.read_text("utf-8").replace("\\\n", " ")
    fenced = [block for kind in ("bash", "sh") for _, block in blocks(page, kind)]
    indented = [line[4:] for line in text.splitlines() if line.startswith("    ")]
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    lines = [*"\n".join(fenced).replace("\\\n", " ").splitlines(), *indented, *inline]
    return [
        re.split(r"\s{2,}|\s#\s", line.strip())[0] for line in lines if _START.match(line.strip())
    ]


def problem(command):
    """What is wrong with a command; None where nothing is. Brackets mean that a part may be absent."""
    words = re.sub(r"[\[\]]", " ", command).split() if "[" in command else shlex.split(command)
    keys = [word for word in words if _KEY.match(word)]
    for key in keys:
        try:
            load_config(None, [key])
        except UserError as error:
            # Alone it may miss its section; a key, or a value of it, must be known.
            if re.search("unknown key|is not one of|now quant|Cannot convert", str(error)):
                return str(error)
    names = [word for word in words if word in ("mqat", "mqat.cli") or word.endswith("/mqat")]
    if names:
        rest = words[words.index(names[0]) + 1 :]
        if not rest or rest[0].startswith("-"):
            return None if rest[:1] == ["--version"] else "no command"
        return next((p for name in rest[0].split("|") if (p := _of_command(name, rest[1:]))), None)
    script = next((word for word in words if word.endswith(".py")), None)
    if script is not None and "{" not in script:
        file = ROOT / script
        if not file.is_file():
            return (
                f"{script}: no such file" if "/" in script else None
            )  # another package's, or a user's
        source = file.read_text("utf-8")
        flags = {
            w.partition("=")[0] for w in words[words.index(script) + 1 :] if w.startswith("--")
        }
        takes = "--config" if "recipe_config" in source else ""
        missing = sorted(flag for flag in flags if f'"{flag}"' not in source and flag != takes)
        return f"{script} has no {missing}" if missing else None
    return None


def _subcommands(parser):
    actions = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return next((action.choices for action in actions), {})


def _of_command(name, words):
    if name not in COMMANDS:
        return f"mqat has no command {name}"
    parser, path = build_parser(), [name, *words]
    while path and path[0] in (below := _subcommands(parser)):
        parser, path = below[path[0]], path[1:]
    known = parser._option_string_actions
    for word in words:
        flag = word.partition("=")[0]
        if word.startswith("--") and flag not in known:
            return f"mqat {name} has no {flag}"
    return None


@pytest.mark.parametrize("page", READ, ids=lambda page: page.name)
def test_every_command_exists_with_its_flags_and_keys(page):
    wrong = {command: why for command in commands(page) if (why := problem(command))}
    assert not wrong


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("mqat exprot CKPT --out DIR", "no command exprot"),
        ("mqat export CKPT --inference-tpp 2", "no --inference-tpp"),
        ("mqat qat --config my.yaml quantization.algorthm=int8", "unknown key"),
        ("torchrun --nproc-per-node 8 examples/gpt_qta.py", "no such file"),
        ("python tools/list_families.py --mesure", "has no"),
        ("mqat qat model.data.format=csv", "is not one of"),
    ],
)
def test_the_check_of_commands_can_fail(command, why):
    assert why in problem(command)


def test_commands_are_found_in_every_place_where_pages_have_them():
    found = [command for page in READ for command in commands(page)]
    assert len(found) > 40
    assert any("mqat verify engine" in c for c in commands(ROOT / "docs" / "tutorial.md"))
    assert any(c.startswith("mqat verify DIR") for c in commands(ROOT / "docs" / "export.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_configurations_of_the_pages_are_loaded(page, tmp_path):
    for _, text in blocks(page, "yaml"):
        found = yaml.safe_load(text)
        sections = {"trainer", "model", "quantization", "export", "exp_manager"}
        if sections & found.keys():
            (tmp_path / "c.yaml").write_text(text)
            load_config(tmp_path / "c.yaml")


def test_every_line_of_data_is_read_as_training_reads_it(tmp_path):
    found = blocks(ROOT / "docs" / "data-formats.md", "json")
    assert {kind for kind, _ in found} == {"text", "sft"} and len(found) > 6
    found += [("sft", text) for _, text in blocks(ROOT / "docs" / "tutorial.md", "json")]
    for kind, text in found:
        file, stats = tmp_path / "data.jsonl", ReadStats()
        file.write_text(text, encoding="utf-8")
        read = read_texts if kind == "text" else read_conversations
        assert len(read([file], "error", stats)) == len(text.splitlines())


def _words_of_the_code():
    """Every string of the package; neighbours are one, and f-strings their constant parts."""
    nodes = [
        n for f in (ROOT / "mqat").rglob("*.py") for n in ast.walk(ast.parse(f.read_text("utf-8")))
    ]
    return [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]


def test_messages_of_the_troubleshooting_page_are_the_codes_own():
    page = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    quotes, words = re.findall(r"^> `(.*)`$", page, re.M), _words_of_the_code()
    assert len(quotes) > 15
    parts = [part.strip() for quote in quotes for part in quote.split("…")]
    missing = [part for part in parts if part and not any(part in text for text in words)]
    assert not missing
    assert not any("a message that nobody wrote" in text for text in words)


def test_the_python_page_has_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text("utf-8")
    shown = re.findall(r"^::: (mqat\.\S+)$", page, re.M)
    assert sorted(name.rpartition(".")[2] for name in shown) == mqat.__all__
    for name in shown:
        module, _, member = name.rpartition(".")
        assert mqat._HOME[member] == module


def test_navigation_has_every_page_and_leaves_out_what_is_absent(tmp_path):
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"]
    kept = present(nav, ROOT / "docs")
    assert set(re.findall(r"[\w-]+\.md", json.dumps(kept))) == {page.name for page in PAGES}
    (tmp_path / "index.md").touch()
    assert present(nav, tmp_path) == [{"Start": [{"What it is": "index.md"}]}]


def test_the_site_builds_without_warnings(tmp_path):
    if (
        importlib.util.find_spec("mkdocs") is None
        or importlib.util.find_spec("mkdocstrings") is None
    ):
        pytest.skip("mkdocs is not installed; pip install 'mqat[docs]' (make docs builds the site)")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "quantize_layer_spec" in (tmp_path / "api.html").read_text("utf-8")

"""Writes docs/configuration.md: every key of the configuration, from `mqat/config.py` itself.

python tools/config_reference.py
"""

from pathlib import Path

from mqat.plan.config_keys import Key, keys

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
_START = """# Configuration

A run is described by a YAML file (`conf/` has many: `mqat recipes`), and by `key=value` on the
command line, which wins. `mqat config KEY` prints what is below; `config.yaml` in a run directory has
every key as it was resolved. A key that is unknown, or that the chosen model, layout or export cannot
honour, is refused by name before anything starts.

This page is written by `tools/config_reference.py` from `mqat/config.py`; a test compares it.
"""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def _row(key: Key) -> str:
    takes = key.takes
    if key.choices:
        takes += ": " + ", ".join(f"`{choice}`" for choice in key.choices)
    default = f"`{key.default}`" if key.default else ""
    name = key.name.rpartition(".")[2]
    return f"| `{name}` | {_cell(takes)} | {default} | {_cell(key.meaning)} |"


def page() -> str:
    """The whole page."""
    known = list(keys())
    lines = [_START]
    for section in (None, *(key for key in known if key.about)):
        own = [k for k in known if k.section == (section.name if section else "") and k.meaning]
        if section is not None:
            lines += [f"## {section.name}", "", section.about, ""]
        lines += ["| key | takes | default | meaning |", "|---|---|---|---|"]
        lines += [*map(_row, own), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")

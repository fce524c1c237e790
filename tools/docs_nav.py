"""A hook of mkdocs: pages of the navigation that this version does not have are left out of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def present(nav: list[Any], docs: Path) -> list[Any]:
    """The entries whose file exists, and the sections that have any."""
    kept: list[Any] = []
    for entry in nav:
        ((title, target),) = entry.items()
        if isinstance(target, list):
            target = present(target, docs)
        elif not (docs / target).is_file():
            continue
        if target:
            kept.append({title: target})
    return kept


def on_config(config: Any) -> Any:
    """Called by mkdocs once its file is read."""
    config.nav = present(config.nav, Path(config.docs_dir))
    return config

"""Files that appear whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any


def write_whole(path: Path, text: str) -> None:
    """Writes UTF-8 text under a temporary name, flushed to disk, then renamed."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def write_json(path: Path, value: Any) -> None:
    """The same for indented JSON."""
    write_whole(path, json.dumps(value, indent=2))

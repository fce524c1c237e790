"""The recipes that are installed with mqat: configurations with a name and a describing first line."""

import difflib
from importlib.resources import files
from pathlib import Path

from mqat.errors import UserError

# `conf/` of the repository, which a wheel holds as a directory of the package.
DIRECTORY = Path(str(files("mqat"))) / "conf"


def recipes() -> dict[str, Path]:
    """Name -> its file."""
    return {path.stem: path for path in sorted(DIRECTORY.glob("*.yaml"))}


def description(path: Path) -> str:
    """The first line of a recipe, a comment that says what it is for."""
    with path.open(encoding="utf-8") as file:
        return file.readline().lstrip("#").strip()


def recipe_file(recipe: str) -> Path:
    """The file of a recipe by name, or of one's own by path; a bare name that is known is the recipe.

    Raises:
        UserError: Neither; says which names come near.
    """
    known = recipes()
    if recipe in known:
        return known[recipe]
    path = Path(recipe)
    if path.is_file():
        return path
    near = difflib.get_close_matches(path.stem, known, n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    raise UserError(f"{recipe}: no such recipe or file; {hint}mqat recipes lists them.")


def known_model(path: Path) -> Path | None:
    """The `config.json` that recipes bring of a model of this name, or None."""
    file = DIRECTORY / "models" / f"{path.name}.json"
    return file if file.is_file() else None

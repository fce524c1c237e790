"""What `model.data.train` may name besides a file: patterns, parquet files, data sets of the hub.

Columnar files give every struct of a column all fields that any of them has; a field that is null there
was not said, and is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from mqat.errors import UserError, nearest_hint

# (place, what parses it) of a record.
Record = tuple[str, Callable[[], Any]]
_HUB = "hub:"


@dataclass(frozen=True)
class HubSource:
    """A data set as the package `datasets` names it: of the hub, its cache, or a local directory.

    Attributes:
        path: `owner/name`, or a directory.
        split: One of its splits, or a slice of one (`train[:1000]`).
        name: Its configuration, where there are several.
        revision: Branch, tag or commit.
    """

    path: str
    split: str = "train"
    name: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        named = {"split": self.split, "name": self.name, "revision": self.revision}
        options = "&".join(f"{key}={value}" for key, value in named.items() if value is not None)
        return f"{_HUB}{self.path}?{options}"


Source = Path | HubSource


def _hub_source(entry: str, key: str) -> HubSource:
    path, _, query = entry.removeprefix(_HUB).partition("?")
    try:
        options = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
    except ValueError as error:
        raise UserError(f"{key}: {entry}: {error}; expected ?split=...&name=...") from error
    for option in options:
        if option not in ("split", "name", "revision"):
            hint = nearest_hint(option, ("split", "name", "revision"))
            raise UserError(f"{key}: {entry}: unknown option {option!r}; {hint}")
    if not path:
        raise UserError(f"{key}: {entry}: names no data set; expected hub:owner/name?split=train.")
    _need("datasets", "reads data sets by name", "or name files", f"{key}: {entry}")
    return HubSource(path, **options)


def _need(package: str, does: str, else_: str, where: str) -> None:
    if find_spec(package) is None:
        raise UserError(
            f"{where}: the package {package!r} is not installed, which {does}; install it with "
            f"pip install 'mqat[data]', {else_}."
        )


def _need_parquet(path: Path, where: str) -> None:
    if path.suffix.lower() == ".parquet":
        _need("pyarrow", "reads parquet", "or convert it to JSON lines", where)


def resolve(entries: Sequence[str | Path], key: str) -> list[Source]:
    """Files (patterns are replaced by the files they match, in the order of names) and data sets.

    Args:
        entries: As configured.
        key: Of the configuration, for complaints.

    Raises:
        UserError: No such file, a pattern without any, or a data set without its package.
    """
    found: list[Source] = []
    for entry in map(str, entries):
        if entry.startswith(_HUB):
            found.append(_hub_source(entry, key))
            continue
        is_pattern = has_magic(entry) and not Path(entry).exists()
        matches = sorted(glob(entry, recursive=True)) if is_pattern else [entry]
        files = [Path(match) for match in matches if Path(match).is_file()]
        if not files:
            what = "no file matches" if is_pattern else "no such file"
            raise UserError(f"{key}: {entry}: {what}; paths are taken from {Path.cwd()}.")
        for file in files:
            _need_parquet(file, f"{key}: {file}")
        found += files
    return found


def is_columnar(source: Source) -> bool:
    """Whether `columnar_records` reads it."""
    return isinstance(source, HubSource) or source.suffix.lower() == ".parquet"


def columnar_records(source: Source) -> Iterator[Record]:
    """Records of a data set or a parquet file, in their order.

    Raises:
        UserError: It cannot be read; names it and the reason of the package that reads it.
    """
    rows = _hub_rows(source) if isinstance(source, HubSource) else _parquet_rows(source)
    for number, row in enumerate(rows, start=1):
        value = _without_nulls(row)
        yield f"{source}, record {number}", lambda value=value: value  # type: ignore[misc]


def _hub_rows(source: HubSource) -> Iterator[Any]:
    import datasets

    try:
        loaded = datasets.load_dataset(
            source.path, source.name, split=source.split, revision=source.revision
        )
    except Exception as error:  # of whatever kind the hub, the network or a file format has
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"{source}: cannot be loaded: {type(error).__name__}: {reason}") from error
    return iter(loaded)


def _parquet_rows(path: Path) -> Iterator[Any]:
    _need_parquet(path, str(path))
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: not a parquet file that can be read: {error}") from error


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value

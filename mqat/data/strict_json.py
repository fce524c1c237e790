"""JSON of which no key may stand twice in an object: readers differ in which of the two they take."""

import json
from collections import Counter
from typing import Any

from mqat.errors import UserError


def parse_json(text: str | bytes, **options: Any) -> Any:
    """A JSON value; `options` are those of `json.loads`.

    Raises:
        ValueError: Not JSON (a JSONDecodeError), not UTF-8, or a key that stands twice (a UserError).
        RecursionError: Nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_without_repeats, **options)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise UserError(f"the key {key!r} is there twice")
    return found

"""Values of a Hugging Face `config.json`, each of the type and in the range that it must have."""

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

from mqat.errors import UserError

# Of layers, and of experts of one: readers list them before they see whether tensors are there.
MOST_LISTED = 1 << 16


def is_whole(value: Any, least: int, most: float = math.inf) -> TypeGuard[int]:
    """Whether it is an integer of that range, both ends included."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def whole_rule(least: int, most: float = math.inf) -> str:
    """What `is_whole` asks for."""
    return f"an integer of at least {least}" + (f", at most {most}" if most < math.inf else "")


def is_positive(value: Any) -> TypeGuard[float]:
    """Whether it is a finite number above zero."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value > 0


class Told(dict[str, Any]):
    """A `config.json` under Llama's keys, with what its family means by absent ones.

    Attributes:
        own: Llama's key -> the family's; None: it has none.
    """

    def __init__(
        self, hf: Mapping[str, Any], own: Mapping[str, str | None], defaults: Mapping[str, Any]
    ) -> None:
        told = {**defaults, **hf}
        super().__init__({key: value for key, value in told.items() if key not in own})
        self.update({key: told[name] for key, name in own.items() if name in told})
        self.own = own


def _key(given: Mapping[str, Any], key: str) -> str:
    """What the file calls a key of Llama's."""
    return (given.own.get(key) if isinstance(given, Told) else None) or key


def whole(
    hf: Mapping[str, Any],
    key: str,
    default: int | None = None,
    *,
    may_be_absent: bool = True,
    least: int = 1,
    most: float = math.inf,
) -> int:
    """An integer; `default`, if there is one, where the key is null or may be absent."""
    value = hf.get(key)
    if value is None and default is not None and (key in hf or may_be_absent):
        value = default
    if not is_whole(value, least, most):
        found = repr(value) if key in hf else "missing"
        name = _key(hf, key)
        raise UserError(f"config.json: {name} is {found}, must be {whole_rule(least, most)}.")
    return value


def positive(
    given: Mapping[str, Any], key: str, prefix: str = "", *, kinds: Any = int | float
) -> float:
    """A finite number above zero."""
    value = given.get(key)
    if not isinstance(value, kinds) or not is_positive(value):
        found = repr(value) if key in given else "missing"
        name = prefix + _key(given, key)
        raise UserError(f"config.json: {name} is {found}, must be a positive number.")
    return float(value)


def flag(hf: Mapping[str, Any], key: str) -> bool:
    """True or false; false where it is absent."""
    value = hf.get(key, False)
    if not isinstance(value, bool):
        raise UserError(f"config.json: {key} is {value!r}, must be true or false.")
    return value

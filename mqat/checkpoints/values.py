"""Values of a Hugging Face `config.json`, each of the type and in the range that it must have."""

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

from mqat.errors import UserError


def is_whole(value: Any, least: int) -> TypeGuard[int]:
    """Whether it is an integer of at least that."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_positive(value: Any) -> TypeGuard[float]:
    """Whether it is a finite number above zero."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value > 0


def whole(
    hf: Mapping[str, Any],
    key: str,
    default: int | None = None,
    *,
    may_be_absent: bool = True,
    least: int = 1,
) -> int:
    """An integer; `default`, if there is one, where the key is null or may be absent."""
    value = hf.get(key)
    if value is None and default is not None and (key in hf or may_be_absent):
        value = default
    if not is_whole(value, least):
        found = repr(value) if key in hf else "missing"
        raise UserError(f"config.json: {key} is {found}, must be an integer of at least {least}.")
    return value


def positive(
    given: Mapping[str, Any], key: str, prefix: str = "", *, kinds: Any = int | float
) -> float:
    """A finite number above zero."""
    value = given.get(key)
    if not isinstance(value, kinds) or not is_positive(value):
        found = repr(value) if key in given else "missing"
        raise UserError(f"config.json: {prefix}{key} is {found}, must be a positive number.")
    return float(value)


def flag(hf: Mapping[str, Any], key: str) -> bool:
    """True or false; false where it is absent."""
    value = hf.get(key, False)
    if not isinstance(value, bool):
        raise UserError(f"config.json: {key} is {value!r}, must be true or false.")
    return value

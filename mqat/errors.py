"""The one error type that people see as a line without a traceback, and a phrase for its messages."""

import difflib
from collections.abc import Callable, Iterable


class UserError(ValueError):
    """Something a user can mend: its message names the thing, the value, the rule and the way out.

    Commands print it as one line. Every other exception is a fault of the program and keeps its
    traceback.
    """


def refusals(checks: Iterable[Callable[[], object]]) -> list[str]:
    """What checks that do not depend on each other refuse, so that a user hears of all at once."""
    found = []
    for check in checks:
        try:
            check()
        except UserError as error:
            found.append(str(error))
    return found


def refuse(found: list[str]) -> None:
    """Raises a UserError of one line of all that was refused, if anything was."""
    if len(found) > 1:
        listed = " ".join(f"({number}) {text}" for number, text in enumerate(found, start=1))
        raise UserError(f"{len(found)} things do not fit: {listed}")
    if found:
        raise UserError(found[0])


def nearest_hint(value: object, known: Iterable[str]) -> str:
    """The end of a message about an unknown name."""
    known = list(known)
    near = difflib.get_close_matches(str(value), known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}."

"""The one error type that people see as a line without a traceback, and a phrase for its messages."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something a user can mend: its message names the thing, the value, the rule and the way out.

    Commands print it as one line. Every other exception is a fault of the program and keeps its
    traceback.
    """


def nearest_hint(value: object, known: Iterable[str]) -> str:
    """The end of a message about an unknown name."""
    known = list(known)
    near = difflib.get_close_matches(str(value), known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}."

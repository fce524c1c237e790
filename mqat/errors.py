"""The one error type that people see as a line without a traceback."""


class UserError(ValueError):
    """Something a user can mend: its message names the thing, the value, the rule and the way out.

    Commands print it as one line. Every other exception is a fault of the program and keeps its
    traceback.
    """

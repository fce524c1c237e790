"""How commands end."""

import pytest

from mqat.runtime.groups import command_line


@pytest.mark.parametrize(
    ("raised", "status", "message"),
    [
        (ValueError("wrong"), 2, "error: wrong\n"),
        (OSError("full"), 2, "error: full\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_what_people_cause_is_one_line_and_a_status(raised, status, message, capsys):
    with pytest.raises(SystemExit) as ended, command_line():
        raise raised
    assert ended.value.code == status and capsys.readouterr().err == message


def test_what_is_a_fault_of_ours_is_a_traceback():
    with pytest.raises(ZeroDivisionError), command_line():
        raise ZeroDivisionError

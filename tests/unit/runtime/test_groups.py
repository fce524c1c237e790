"""What a user can mend is one line; what the program got wrong keeps its traceback."""

import pytest

from mqat.errors import UserError
from mqat.runtime.groups import command_line, decided_by_main, on_all_ranks, raise_on_any_rank


def test_a_users_error_is_raised_as_one():
    with pytest.raises(UserError, match="no such file"):
        raise_on_any_rank(FileNotFoundError(2, "no such file", "weights"))
    with pytest.raises(UserError, match="too small"), on_all_ranks():
        raise UserError("too small")


def test_any_other_error_stays_what_it_is():
    fault = KeyError("layer")
    with pytest.raises(KeyError) as caught, on_all_ranks():
        raise fault
    assert caught.value is fault
    with pytest.raises(ValueError, match="shape") as caught, on_all_ranks():
        raise ValueError("shape")
    assert not isinstance(caught.value, UserError)


def test_without_other_ranks_the_first_decides_alone():
    assert decided_by_main(lambda: 7) == 7
    with pytest.raises(UserError, match="none"):
        decided_by_main(lambda: raise_on_any_rank(UserError("none")))


@pytest.mark.parametrize(
    ("raised", "status", "message"),
    [
        (UserError("too small"), 2, "error: too small\n"),
        (
            FileNotFoundError(2, "not there", "weights"),
            2,
            "error: [Errno 2] not there: 'weights'\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_what_people_cause_is_one_line_and_a_status(raised, status, message, capsys):
    with pytest.raises(SystemExit) as ended, command_line():
        raise raised
    assert ended.value.code == status and capsys.readouterr().err == message


@pytest.mark.parametrize("fault", [ValueError("ours"), ZeroDivisionError(), OSError("no file")])
def test_a_fault_of_the_program_keeps_its_traceback(fault):
    with pytest.raises(type(fault)) as caught, command_line():
        raise fault
    assert caught.value is fault

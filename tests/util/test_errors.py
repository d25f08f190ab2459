"""Tests of the errors that a user reads."""

import pytest

from nla_jax import errors


def _raise(e: BaseException):
    raise e


@pytest.mark.parametrize("main, status, said", [
    (lambda: None, None, ""),
    (lambda: 1, 1, ""),
    (lambda: _raise(errors.UserError("no such bundle: name one")), 2, "study: no such bundle: name one\n"),
    (lambda: _raise(KeyboardInterrupt()), 130, "study: stopped\n"),
], ids=["none", "status", "user error", "ctrl-c"])
def test_run_main_exits_as_the_command_line_does(main, status, said, capsys):
    with pytest.raises(SystemExit) as found:
        errors.run_main(main, "study")
    assert found.value.code == status
    assert capsys.readouterr().err == said

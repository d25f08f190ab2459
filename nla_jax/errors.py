"""The one exception that is meant for people rather than for programs."""


class UserError(Exception):
    """Something the caller can fix: one line that says what was wrong, where, and what to do.

    The command line prints the message without a traceback and exits with status 2.
    """

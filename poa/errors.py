"""The one error type for wrong input."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one line: what was expected, what was got.

    The command line prints it without a traceback and exits with code 2.
    """

"""The one exception for a mistake that the user can mend."""


class InputError(ValueError):
    """A bad config, file, row or checkpoint.

    The message is one line that names the field or row, the value, and the remedy; the command line
    prints it without a traceback and exits with status 2.
    """


class RunFailed(RuntimeError):
    """A run that cannot go on; the message is one line, and what was saved stays as it is."""

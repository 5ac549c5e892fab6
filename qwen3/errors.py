"""The one exception for what a user can cause, so that entry points can tell it from a bug in this project."""


class UserError(ValueError):
    """Bad input from outside: a file, a field, a folder, a server.

    The message is one line that names the thing, where it is and what would help. Command-line entry points
    print it without a traceback and exit with status 2.
    """

"""The one exception that the command line turns into one line."""


class InputError(ValueError):
    """Something a user can put right: says what was wrong, what was wanted and what to do, in one line."""

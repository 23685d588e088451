"""The one exception that the command line turns into one line."""


class InputError(Exception):
    """Something a user can put right: says what was wrong, what was wanted and what to do, in one line.

    Not a ValueError: the parser of the command line would catch that and print a page of its own.
    """

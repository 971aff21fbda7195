"""The one error that users see as a single line: what came, what was expected, the mend."""


class InputError(ValueError):
    """Wrong input from outside (a file, an option, a checkpoint). The command line prints it as one line, exit status 2."""

"""The one exception for input that can't be honoured: its text names what was found, what was expected and what to do."""


class GraniteError(ValueError):
    """A bad checkpoint, argument or environment. The command line prints it on one line and exits with 2."""

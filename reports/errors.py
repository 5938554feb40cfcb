"""The one exception of this package."""


class ReportError(ValueError):
    """A folder that cannot be reported on; the command line prints the message and returns 2."""

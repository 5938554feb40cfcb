"""What an error of a library says, for a line of ours."""

from __future__ import annotations


def one_line(error: Exception, limit: int = 300) -> str:
    """The error's message on one line of at most `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."

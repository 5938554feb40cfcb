"""The one exception family of the project."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class QzoError(ValueError):
    """Wrong input or a case that cannot be served; the command line prints the message and returns 2."""


@contextmanager
def named(layer: str) -> Iterator[None]:
    """Put the layer's name in front of a QzoError raised inside."""
    try:
        yield
    except QzoError as error:
        raise QzoError(f"{layer}: {error}") from error

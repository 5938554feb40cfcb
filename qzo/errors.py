"""The one exception family of the project, and the error of a library that is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any


class QzoError(ValueError):
    """Wrong input or a case that cannot be served; the command line prints the message and returns 2."""


@contextmanager
def named(layer: str) -> Iterator[None]:
    """Put the layer's name in front of a QzoError raised inside."""
    try:
        yield
    except QzoError as error:
        raise QzoError(f"{layer}: {error}") from error


def required(module: str, install: str) -> Any:
    """A module of a library that may be missing; raises QzoError then, with what `pip install` brings it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise QzoError(f"this needs the package {module.partition('.')[0]}; run: pip install {install}") from error

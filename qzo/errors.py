"""The one exception family of the project, the error of a library that is missing, and text that is safe to print."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

LONGEST, END = 2_000, 500  # characters of an error, and of its end: a name in a damaged file may have millions


class QzoError(ValueError):
    """Wrong input or a case that cannot be served; the command line prints the message and returns 2.

    A message is one line that any terminal can be shown (see `printable`), whatever names of files, tensors or keys are
    in it.
    """

    def __init__(self, message: object = "") -> None:
        text = printable(message)
        super().__init__(text if len(text) <= LONGEST else f"{text[: LONGEST - END]} ... {text[-END:]}")


def printable(text: object) -> str:
    """Text in one line that does nothing to a terminal: what is no printable character is shown as Python escapes it.

    Names in files are free to hold escape codes, which move the cursor or set the clipboard, line breaks, which
    counterfeit a second message, marks that turn the direction of writing, and halves of characters, which cannot be
    encoded. Applied twice it changes nothing more.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


class NotFinite(QzoError):
    """NaN or infinity where numbers are needed: in what a model gives, or in the files of one."""


@contextmanager
def named(layer: str) -> Iterator[None]:
    """Put the layer's name in front of a QzoError raised inside."""
    try:
        yield
    except QzoError as error:
        kind = NotFinite if isinstance(error, NotFinite) else QzoError
        raise kind(f"{layer}: {error}") from error


def is_failure(error: BaseException) -> bool:
    """Whether an exception tells of a failure, not of a wish to stop: panics of a library in Rust are no Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


# Remedies that refusals of a checkpoint have in common; a remedy stands behind the last semicolon of a message.
AGAIN = "copy or download all of its files again, or take config.json and weights from one checkpoint"
OTHER = "take a checkpoint of a kind that the README names, or quantize the original with qzo quantize"
ACCESS = "check its name and who may read it"  # of any file; whoever knows what it is for has a better one
RULES = ("need ", "only ", "there are ", "they do not ", "it is ")  # what may stand there and is none


@contextmanager
def advised(remedy: str) -> Iterator[None]:
    """Put a remedy behind a QzoError raised inside that has none."""
    try:
        yield
    except QzoError as error:
        text = str(error).removesuffix(f"; {ACCESS}")
        _, has_clause, last = text.rpartition("; ")
        if has_clause and not last.startswith(RULES):
            raise
        raise type(error)(f"{text}; {remedy}") from error


def required(module: str, install: str) -> Any:
    """A module of a library that may be missing; raises QzoError then, with what `pip install` brings it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise QzoError(f"this needs the package {module.partition('.')[0]}; run: pip install {install}") from error

"""SIGTERM and SIGINT as exceptions that come when nothing is half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qzo.errors import QzoError

SIGNALS: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM)
_held = 0
_pending: int = 0


class Interrupted(KeyboardInterrupt):
    """A signal came; `number` is its number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Stopped(QzoError):
    """A signal ended the work, and what there is was saved; the command line returns 128 + `number`."""

    def __init__(self, message: str, cause: KeyboardInterrupt) -> None:
        super().__init__(message)
        self.number = number_of(cause)


def number_of(cause: KeyboardInterrupt) -> int:
    """Of the signal behind an exception; Ctrl-C where nothing else is known."""
    return int(cause.number if isinstance(cause, Interrupted) else signal.SIGINT)


@contextmanager
def interruptible() -> Iterator[None]:
    """Within, SIGINT and SIGTERM raise Interrupted, at once or, within `held`, at its end.

    Handlers of the program's own are left alone; in other threads than the main one nothing is changed.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, _raise)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def held() -> Iterator[None]:
    """Within, a signal waits: for the few lines between which a state on disk or in memory is half a state."""
    global _held, _pending
    _held += 1
    try:
        yield
    finally:
        _held -= 1
        number: int = 0 if _held else _pending
        _pending = _pending if _held else 0
    if number:
        raise Interrupted(number)


def _raise(number: int, _: Any) -> None:
    global _pending
    if _held:
        _pending = number
    else:
        raise Interrupted(number)

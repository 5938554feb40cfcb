"""SIGINT and SIGTERM as wishes: a training that is told to stop does so after its step, with everything saved."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

ASKED = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}  # with what they would do


class Stop:
    """What was asked for: `signal` is None until one comes; the second one of a kind does what it would have done."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        if self.signal is not None:
            raise_for(signal.Signals(number))
        self.signal = signal.Signals(number)
        text = f"{self.signal.name}: stopping after this step; once more stops at once\n"
        os.write(2, text.encode())  # print is not reentrant


def raise_for(number: signal.Signals) -> NoReturn:
    """KeyboardInterrupt for SIGINT, so that a shell sees 130, and SystemExit(143) for SIGTERM."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Within, SIGINT and SIGTERM are noted in the Stop; handlers that a script has set itself are left alone.

    Python runs handlers in the main thread only; in others nothing is changed.
    """
    stop = Stop()
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number, own in ASKED.items() if signal.getsignal(number) == own}
    for number in before:
        signal.signal(number, stop)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

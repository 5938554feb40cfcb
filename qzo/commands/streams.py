"""Standard output and error that may go away: a reader that has seen enough, as `| head -1`, ends no training."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Tolerant:
    """A text stream that is silent from the moment on at which its reader is gone; `errors`: what else is no matter."""

    def __init__(self, stream: Any, errors: type[OSError] = BrokenPipeError) -> None:
        self._stream, self._errors = stream, errors

    def write(self, text: str) -> int:
        """As the stream's."""
        try:
            return int(self._stream.write(text) or 0)
        except self._errors:
            self._silence()
            return len(text)

    def flush(self) -> None:
        """As the stream's."""
        try:
            self._stream.flush()
        except self._errors:
            self._silence()

    def _silence(self) -> None:
        """What waits in the stream, and all after it, goes nowhere."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def tolerant_streams() -> Iterator[None]:
    """Within, nobody is hurt by a reader of standard output or error that went away.

    Standard error, which only tells how things go, may fail for any reason.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Tolerant(sys.stdout), Tolerant(sys.stderr, OSError)
    try:
        yield
        sys.stdout.flush()
    finally:
        sys.stdout, sys.stderr = before

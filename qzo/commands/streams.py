"""Standard output and error that may go away: a reader that has seen enough, as `| head -1`, ends no training."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qzo.durable import reason
from qzo.errors import QzoError


class Tolerant:
    """A text stream that is silent from the moment on at which its reader is gone; `errors`: what else is no matter.

    Any other failure is a QzoError, once, so that what is printed by argparse, which overlooks an OSError, is told too.
    """

    def __init__(self, stream: Any, errors: type[OSError] = BrokenPipeError) -> None:
        self._stream, self._errors = stream, errors

    def write(self, text: str) -> int:
        """As the stream's."""
        with self._tolerated():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """As the stream's."""
        with self._tolerated():
            self._stream.flush()

    @contextmanager
    def _tolerated(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._silence()  # else Python tries again when it ends, and fails
            if not isinstance(error, self._errors):
                raise QzoError(f"standard output could not be written: {reason(error)}; free some space") from error

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
    sys.stdout, sys.stderr = Tolerant(_opened(sys.stdout)), Tolerant(_opened(sys.stderr), OSError)
    try:
        try:
            yield
        except SystemExit:  # of --help and --version
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    finally:
        sys.stdout, sys.stderr = before


def _opened(stream: Any) -> Any:
    """A stream, or nowhere in the place of one that was closed before the start; so no file gets its number."""
    return open(os.devnull, "w", encoding="utf-8") if stream is None else stream

"""A place that a user names for a result, as with `--json PATH`: a file is replaced whole, a device is written to."""

from __future__ import annotations

import errno
import os
import re
import sys
import time
from pathlib import Path

from qzo.durable import reason, replace_file
from qzo.errors import QzoError

OPEN_FILES = re.compile(r"/(?:dev|proc/(?:self|\d+))/fd/(\d+)|/dev/(stdin|stdout|stderr)")
PATIENCE = 10  # seconds that a FIFO's reader is waited for
STANDARD = {"stdin": 0, "stdout": 1, "stderr": 2}


def check_output(path: str | os.PathLike[str], option: str = "--json") -> None:
    """Raise QzoError unless `write_output` may write to `path`."""
    place = Path(path)
    if _number(place) is not None:
        return
    if not place.absolute().parent.is_dir():
        raise QzoError(f"{option} {place}: there is no such folder; make it first")
    if place.is_dir():
        raise QzoError(f"{option} {place} is a folder; name a file")
    if place.is_symlink() and (place.is_file() or not place.exists()):
        raise QzoError(f"{option} {place} is a link to {place.readlink()}, and links are not followed; name the file")


def write_output(path: str | os.PathLike[str], text: str, option: str = "--json") -> None:
    """Write what a user asked for to where he asked for it: a file as a whole, a device or pipe straight.

    A FIFO's reader is waited for, but not for ever.

    Raises QzoError as `check_output`, and where writing fails; a file then is what it was.
    """
    check_output(path, option)
    place, number = Path(path), _number(Path(path))
    if number is None and (place.is_file() or not place.exists()):
        replace_file(place, lambda file: file.write_text(text, encoding="utf-8"))
        return
    try:
        sys.stdout.flush()
        opened = _opened(place) if number is None else os.dup(number)
        with open(opened, "w", encoding="utf-8") as file:
            file.write(text)
    except NobodyReads as error:
        raise QzoError(f"{option} {place} {error}; start its reader first") from error
    except OSError as error:
        raise QzoError(f"{option} {place} could not be written: {reason(error)}; name another place") from error


class NobodyReads(Exception):
    """A FIFO without a reader."""


def _opened(place: Path) -> int:
    """A device, or a FIFO whose reader is there or comes within PATIENCE seconds."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            number = os.open(place, os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
            os.set_blocking(number, True)
            return number
        except OSError as error:
            if error.errno != errno.ENXIO or not place.is_fifo():
                raise
        if time.monotonic() > deadline:
            raise NobodyReads(
                f"is a FIFO that no program opened for reading within {PATIENCE} s; start its reader first, or name a "
                "file"
            )
        time.sleep(0.02)


def _number(path: Path) -> int | None:
    """The number of the open file that a name under /dev or /proc stands for, as /dev/stdout does."""
    found = OPEN_FILES.fullmatch(os.path.abspath(path))
    return None if found is None else STANDARD[found[2]] if found[2] else int(found[1])

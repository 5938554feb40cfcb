"""Files that are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from qzo.errors import QzoError


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file under a temporary name beside `path`, sync it, and rename it to `path`.

    Raises QzoError where the disk is full or refuses; `path` then is what it was.
    """
    partial = path.with_name(f".{path.name}.part")
    try:
        write(partial)
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    except Exception as error:  # OSError, or what a library makes of it
        partial.unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise QzoError(f"{path} could not be written: {reason}; what was there is unchanged") from error


def sync(path: Path) -> None:
    """Have the system write a file or folder to the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)

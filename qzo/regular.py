"""What may be opened to be read or appended to: a regular file.

A FIFO is waited for without end, in a library where no signal ends it, and a device may have no end.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from qzo.errors import ACCESS, QzoError

MIB = 2**20
KINDS = ((stat.S_ISFIFO, "FIFO"), (stat.S_ISSOCK, "socket"), (stat.S_ISCHR, "device"), (stat.S_ISBLK, "device"))


def check_regular(file: Path, most_mib: int | None = None) -> None:
    """Raise QzoError unless a path is that of a regular file of at most so many MiB; links are followed."""
    try:
        about = file.stat()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise QzoError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}; {ACCESS}") from error
    if not stat.S_ISREG(about.st_mode):
        kind = next((name for is_kind, name in KINDS if is_kind(about.st_mode)), "folder")
        raise QzoError(f"{file} is a {kind}; only regular files are read")
    if most_mib is not None and about.st_size > most_mib * MIB:
        raise QzoError(
            f"{file} has {about.st_size:,} bytes; no real file of its kind has more than {most_mib} MiB: restore it "
            "from a copy"
        )


def is_there(file: Path) -> bool:
    """Whether anything at all has this name: what is no regular file is then told, not passed over as absent."""
    return os.path.lexists(file)

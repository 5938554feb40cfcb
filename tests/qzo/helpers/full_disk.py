"""A disk with little room."""

import errno
import os


class FullDisk:
    """os.write with room for so many bytes more."""

    def __init__(self, room, write=os.write):
        self.room, self.write = room, write

    def __call__(self, number, data):
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self.write(number, data[: self.room])
        self.room -= written
        return written

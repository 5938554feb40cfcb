"""metrics.jsonl: what a run measured, one JSON object a line, each of them sealed.

The last key of a line is "crc": the CRC-32 of the line without it, whose start value is the one of the line before, in
8 hex digits. A line that was changed, lost, doubled or moved shows, as in the journal. Lines of an older version have
no seal; they may stand before those that have.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import zlib
from pathlib import Path
from typing import Any

from qzo.errors import QzoError
from qzo.regular import check_regular, is_there

SEALED = re.compile(rb'(\{.*), "crc": "([0-9a-f]{8})"\}\n')
MOST_MIB = 1024  # some ten million lines; they are read whole
Entry = dict[str, Any]


class Metrics:
    """The file, open for appending. Raises QzoError where it cannot be opened, or is no regular file."""

    def __init__(self, path: Path, metric: str) -> None:
        self.path, self.metric, self._crc = path, metric, 0
        self.sealed = True  # whether no line is of an older version
        if is_there(path):
            check_regular(path, MOST_MIB)
        try:
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise QzoError(f"{path} cannot be opened: {error.strerror}; choose another --out") from error

    def read(self, steps: int) -> list[Entry]:
        """The lines of the first `steps` steps, checked; all after them, and half a last line, are cut off.

        Raises QzoError, with the number of the line, for one that is damaged or says what cannot be.
        """
        entries: list[Entry] = []
        end, crc, sealed = 0, 0, False
        self.sealed = True
        *lines, _ = self.path.read_bytes().split(b"\n")  # the last is torn by a kill: its step is taken again
        for number, text in enumerate(lines, 1):
            line = text + b"\n"
            found = SEALED.fullmatch(line)
            crc = zlib.crc32(found[1] + b"}" if found else line, crc)
            if (found and found[2] != b"%08x" % crc) or (sealed and not found):
                raise QzoError(
                    f"{self.path}: line {number} is damaged, its checksum does not fit; restore the file from a copy"
                )
            sealed = bool(found)
            entry = self._checked(line, number, entries[-1]["step"] if entries else 0)
            if entry["step"] > steps:
                break
            entries.append(entry)
            self.sealed = self.sealed and sealed
            end, self._crc = end + len(line), crc
        if not entries:
            self._crc = 0
        self._file.truncate(end)
        return entries

    def _checked(self, line: bytes, number: int, least: int) -> Entry:
        try:
            entry = json.loads(line)
            step = entry["step"]
            if type(step) is not int or step < least:
                raise ValueError(f"step {step!r} after step {least}")
            result = entry.get("validation", {self.metric: None})
            for value in (result[self.metric], result.get("loss")):
                if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                    raise ValueError(f"{value!r} is no number")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else f"cannot be read: {error}"
            raise QzoError(f"{self.path}: line {number} {what}; restore the file from a copy") from error
        entry.pop("crc", None)
        return dict(entry)

    def write(self, entry: Entry, durable: bool = False) -> None:
        """Append a line, with `durable` down to the disk. Raises QzoError for a full one; no half line is left."""
        text = json.dumps(finite(entry))
        crc = zlib.crc32(text.encode(), self._crc)
        line = memoryview(f'{text[:-1]}, "crc": "{crc:08x}"}}\n'.encode())
        end = os.fstat(self._file.fileno()).st_size
        try:
            while line:
                line = line[os.write(self._file.fileno(), line) :]
            if durable:
                os.fsync(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(end)
            raise QzoError(
                f"{self.path} could not be written: {error.strerror}; free some space, then --resume"
            ) from error
        self._crc = crc

    def close(self) -> None:
        """Release the file."""
        self._file.close()


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity; they become null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value

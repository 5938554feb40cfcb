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
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

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
        end, self._crc, self.sealed = 0, 0, True
        for line in _lines(self.path, self.metric):
            if line.entry["step"] > steps:
                break
            entries.append(line.entry)
            self.sealed = self.sealed and line.sealed
            end, self._crc = line.end, line.crc
        self._file.truncate(end)
        return entries

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


class _Line(NamedTuple):
    """A line that was read, where it ends, and the checksum that the next one starts from."""

    entry: Entry
    end: int
    crc: int
    sealed: bool


def read_metrics(path: Path, metric: str) -> list[Entry]:
    """All whole lines of a file that may be written to meanwhile; nothing of it is changed.

    Raises QzoError as `Metrics.read`, and where there is no such file.
    """
    check_regular(path, MOST_MIB)
    return [line.entry for line in _lines(path, metric)]


def _lines(path: Path, metric: str) -> Iterator[_Line]:
    """The lines, each checked when it is asked for. Raises QzoError."""
    end, crc, sealed, least = 0, 0, False, 0
    *lines, _ = path.read_bytes().split(b"\n")  # the last is torn by a kill: its step is taken again
    for number, text in enumerate(lines, 1):
        line = text + b"\n"
        found = SEALED.fullmatch(line)
        crc = zlib.crc32(found[1] + b"}" if found else line, crc)
        if (found and found[2] != b"%08x" % crc) or (sealed and not found):
            raise QzoError(f"{path}: line {number} is damaged, its checksum does not fit; restore the file from a copy")
        sealed, end = bool(found), end + len(line)
        entry = _checked(path, metric, line, number, least)
        least = entry["step"]
        yield _Line(entry, end, crc, sealed)


def _checked(path: Path, metric: str, line: bytes, number: int, least: int) -> Entry:
    try:
        entry = json.loads(line)
        step = entry["step"]
        if type(step) is not int or step < least:
            raise ValueError(f"step {step!r} after step {least}")
        result = entry.get("validation", {metric: None})
        for value in (result[metric], result.get("loss")):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ValueError(f"{value!r} is no number")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else f"cannot be read: {error}"
        raise QzoError(f"{path}: line {number} {what}; restore the file from a copy") from error
    entry.pop("crc", None)
    return dict(entry)


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity; they become null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""Text files of rows: decoded, bounded, and every error with file and line.

A few megabytes of gzip can hold a line, or lines, of some gigabytes, and a file in another encoding reads as nonsense:
both are told before anything is made of them.
"""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qzo.errors import ACCESS, QzoError
from qzo.files.bounds import AmbiguousKey, check_file, said_once
from qzo.tasks.source.row import Row, shown

LONGEST_LINE = 2**22  # characters; an example has a few thousand
LEAST_TEXT, PACKED = 2**26, 200  # what a file may hold, at least and for each of its bytes; text packs ten to one
MOST_LINES = 1_000_000
UTF_32 = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)  # the first begins like UTF-16
MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}


def json_lines(file: Path) -> Iterator[Row]:
    """The objects of a file of JSON lines, .gz or not; blank lines are passed over. Raises QzoError."""
    count = 0
    for number, line in enumerate(lines_of(file), 1):
        if line.strip():
            count += 1
            yield Row(where := f"{file}, line {number}", object_of(line, where))
    if not count:
        raise QzoError(f"{file} is empty; it must hold one JSON object a line")


def lines_of(file: Path) -> Iterator[str]:
    """The lines of a text file, .gz or not, in UTF-8, or in UTF-16 with its mark.

    Raises QzoError, with the line, for text in another encoding and for a file that stands for far more text than any
    real one; for one that cannot be read.
    """
    check_file(file)
    opener: Any = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rb") as raw:
            yield from _decoded(raw, file)
    except (OSError, EOFError, zlib.error) as error:
        raise QzoError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}; {ACCESS}") from error


def _decoded(raw: Any, file: Path) -> Iterator[str]:
    """Lines are read as bytes, so that one that cannot be decoded has its number."""
    total, limit = 0, max(LEAST_TEXT, PACKED * file.stat().st_size)
    first: bytes = raw.readline(LONGEST_LINE)
    if first.startswith(UTF_32):
        raise QzoError(f"{file} is UTF-32; save the file as UTF-8")
    mark = next((mark for mark in MARKS if first.startswith(mark)), b"")
    if MARKS.get(mark, "utf-8") != "utf-8":
        yield from _utf_16(first + raw.read(limit), MARKS[mark], file)
        return
    count, line = 0, first[len(mark) :]
    while line:
        total, count = total + len(line), count + 1
        _check_line(file, count, len(line), total, limit)
        yield _text(line, file, count)
        line = raw.readline(LONGEST_LINE)


def _check_line(file: Path, count: int, length: int, total: int, limit: int) -> None:
    if count > MOST_LINES:
        raise QzoError(f"{file} has more than {MOST_LINES:,} lines; cut it, a run needs far fewer examples")
    if length >= LONGEST_LINE:
        raise QzoError(
            f"{file}, line {count} has more than {LONGEST_LINE:,} characters; an example needs far fewer: cut "
            "it, or break it up"
        )
    if total > limit:
        raise QzoError(
            f"{file} holds more than {limit:,} characters, {PACKED} times its size; is it damaged? Then copy or "
            "download it again"
        )


def _text(line: bytes, file: Path, number: int) -> str:
    if b"\0" in line:
        raise QzoError(f"{file}, line {number} holds zero bytes; it is no text file: give JSON lines, CSV, TSV or text")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise QzoError(
            f"{file}, line {number} is not UTF-8 (byte 0x{line[error.start]:02x}, column {error.start + 1}); save the "
            "file as UTF-8"
        ) from error


def _utf_16(data: bytes, encoding: str, file: Path) -> Iterator[str]:
    try:
        text = data[2:].decode(encoding)
    except UnicodeDecodeError as error:
        raise QzoError(f"{file} begins like UTF-16 and is not; save the file as UTF-8") from error
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        _check_line(file, number, len(line), 0, 0)
        yield line


def object_of(line: str, where: str) -> dict[str, Any]:
    """The JSON object that a text is. Raises QzoError for anything else, and for text that cannot be encoded."""
    try:
        fields = json.loads(line, object_pairs_hook=said_once)
    except AmbiguousKey as error:
        raise QzoError(f"{where}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise QzoError(f"{where} is not JSON: {error}; a line must be one whole JSON object") from error
    if not isinstance(fields, dict):
        more = ", one a line; a list of objects is a .json file" if isinstance(fields, list) else ""
        raise QzoError(f"{where} is {shown(fields)}; it must be a JSON object{more}")
    check_characters(fields, where, line)
    return fields


def check_characters(fields: Any, where: str, text: str) -> None:
    """Raise QzoError for JSON with half a character, which no tokenizer takes; looked for where one may be."""
    if "\\ud" not in text and "\\uD" not in text:
        return
    try:
        json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise QzoError(
            f"{where} holds half a character, \\u{ord(error.object[error.start]):04x} alone; write the file anew as "
            "UTF-8"
        ) from error
